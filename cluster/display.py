"""What a person sees while a run goes on: a live table on a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_LINES = 40  # where there is no terminal, about so many lines a run
SMOOTHING = 0.9  # of the displayed seconds a step

Record = Mapping[str, Any]


class Display:
    """Shows steps and evaluations. Use as a context manager around the run."""

    def __init__(
        self, *, name: str, steps: int, console: Console, plain_lines: int = PLAIN_LINES
    ) -> None:
        self._name = name
        self._console = console
        self._plain_lines = plain_lines
        self.expect(steps)
        self._seconds_per_step = 0.0
        self._last: Record = {}
        self._eval: Record = {}
        self._said = ""
        self._began = time.monotonic()
        self._live = (
            Live(get_renderable=self._draw, console=console, refresh_per_second=2, transient=True)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def expect(self, steps: int) -> None:
        """How many steps the run has: known only once its data is, where it goes by epochs."""
        self._steps = steps
        self._every = max(1, steps // self._plain_lines)

    def say(self, text: str) -> None:
        """A sentence about what happens now."""
        self._said = text
        if not self._live:
            self.note(text)

    def note(self, text: str) -> None:
        """A sentence that stays to be read: on a terminal it scrolls above the live table."""
        line = f"[{self._name}] {text}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def on_step(self, metrics: Record) -> None:
        self._last = metrics
        self._said = "training"
        seconds = float(metrics["seconds.step"])
        kept = SMOOTHING if self._seconds_per_step else 0.0
        self._seconds_per_step = kept * self._seconds_per_step + (1 - kept) * seconds
        step = metrics["step"]
        if not self._live and (step % self._every == 0 or step == self._steps):
            line = " · ".join(f"{label} {value}" for label, value in self._numbers())
            self._console.print(line, highlight=False, soft_wrap=True)

    def on_eval(self, evaluation: Record) -> None:
        self._eval = evaluation
        self._said = f"step {evaluation['step']} evaluated"
        self.note(
            f"held out, step {evaluation['step']}: accuracy {evaluation['accuracy']:.3f}, format "
            f"{evaluation['format']:.3f} (n {evaluation['n']})"
        )

    def _numbers(self) -> Sequence[tuple[str, str]]:
        m = self._last
        left = (self._steps - int(m["step"])) * self._seconds_per_step
        return [
            ("step", f"{m['step']}/{self._steps}"),
            *(_of_rollouts(m) if "reward.mean" in m else [("loss", f"{m['loss']:.3f}")]),
            ("s/step", f"{self._seconds_per_step:.1f}"),
            ("left", f"{int(left // 60)}:{int(left % 60):02d}"),
        ]

    def _draw(self) -> RenderableType:
        title = Text(f"medrl · {self._name} · {self._said}", style="bold")
        if not self._last:
            return Group(title, Text(f"{time.monotonic() - self._began:.0f} s"))
        table = Table.grid(padding=(0, 2))
        for label, value in self._numbers():
            table.add_row(Text(label, style="dim"), value)
        if self._eval:
            held_out = f"{self._eval['accuracy']:.3f} at step {self._eval['step']}"
            table.add_row(Text("held-out accuracy", style="dim"), held_out)
        # In a grid of its own: a bar ends no line.
        bar = Table.grid()
        bar.add_row(ProgressBar(total=self._steps, completed=int(self._last["step"]), width=60))
        return Group(title, bar, table)


def _of_rollouts(metrics: Record) -> Sequence[tuple[str, str]]:
    parts = [k.removeprefix("reward.") for k in metrics if k.startswith("reward.")]
    return [
        ("reward", f"{metrics['reward.mean']:.2f}"),
        *((part, f"{metrics[f'reward.{part}']:.2f}") for part in parts if part != "mean"),
        ("entropy", f"{metrics['entropy']:.2f}"),
        ("gap", f"{metrics['logprob_gap.max']:.0e}"),
        ("tokens/s", f"{metrics['tokens.per_second']:.0f}"),
        ("staleness", f"{metrics['staleness.max']}"),
    ]


def comparison(before: Record, after: Record) -> Table:
    """Held-out accuracy of two evaluations, by modality and by question type."""
    table = Table(title=f"held-out accuracy, {after['split']}, greedy")
    table.add_column("")
    for heading in ("n", f"step {before['step']}", f"step {after['step']}", "change"):
        table.add_column(heading, justify="right")

    def add(label: str, n: int, old: float, new: float, style: str = "") -> None:
        cells = (f"{n}", f"{old:.3f}", f"{new:.3f}", f"{new - old:+.3f}")
        table.add_row(label, *cells, style=style)

    for kind in ("modality", "question_type"):
        for name, new in after[f"by_{kind}"].items():
            old = before[f"by_{kind}"].get(name, 0.0)
            add(name, after[f"n_by_{kind}"][name], old, new)
        table.add_section()
    add("all", after["n"], before["accuracy"], after["accuracy"], "bold")
    add("format", after["n"], before["format"], after["format"])
    return table
