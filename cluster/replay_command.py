"""`medrl replay`. Exit status: 0 the same, 1 it differs or failed, 2 cannot be repeated."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from medrl.cluster.console import make_console

if TYPE_CHECKING:
    from medrl.cluster.replay_compare import Comparison

ROWS = 12  # of the table: the last steps


def register(app: typer.Typer) -> None:
    """Add the command to `medrl`."""
    app.command()(replay)


def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, e.g. runs/demo.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SECTION.KEY=VALUE",
            help="What may be another here: placement.* less placement.learners, model.path, "
            "data.train, data.test, data.images.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=0, help="The first so many; 0: all.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="A new folder for the replay; else RUN-replay.")
    ] = None,
) -> int:
    """Repeat a run by the schedule in its journal, and compare all that comes of it.

    Which group, which version, which order: with these, tokens and losses of a run are the same
    again at any staleness. Starts from the run's starting model; ends at the first step that
    differs, with exit status 1.
    """
    from medrl.cluster.quiet import quiet_libraries

    console = make_console()
    done: list[Comparison] = []

    def say(text: str) -> None:
        console.print(f"[replay] {text}", highlight=False, markup=False, soft_wrap=True)

    def on_step(compared: Comparison) -> None:
        done.append(compared)
        say(f"step {compared.step}: {compared.difference or 'the same'}")

    with quiet_libraries():
        from medrl.cluster.replay import prepare_replay, run_replay

        say("checking model, data and rewards")
        prepared = prepare_replay(run, out, steps, overrides or [])
        for note in prepared.notes:
            say(note)
        asyncio.run(run_replay(prepared, say, on_step))
    show_replay(done, console)
    return 0 if all(step.same for step in done) else 1


def show_replay(done: Sequence[Comparison], console: Console) -> None:
    """Print the last steps, and what all came to."""
    console.print(_table(done[-ROWS:]))
    tokens, completions = sum(s.tokens for s in done), sum(s.completions for s in done)
    apart = max(abs(step.loss[1] - step.loss[0]) for step in done)
    logprobs = max(step.logprobs_apart for step in done)
    if done[-1].same:
        verdict = (
            f"the same: {len(done)} steps, {completions} completions, {tokens} tokens; losses "
            f"{apart:.1g} apart at most, log-probs {logprobs:.1g}"
        )
    else:
        verdict = f"not the same: {done[-1].difference}"
    console.print(verdict, highlight=False, markup=False, soft_wrap=True)


def _table(done: Sequence[Comparison]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("step", "completions", "tokens", "loss then", "loss now", "gradient now", ""):
        table.add_column(heading, justify="left" if not heading else "right")
    for step in done:
        table.add_row(
            *(f"{step.step}", f"{step.completions}", f"{step.tokens}"),
            *(f"{step.loss[0]:.7f}", f"{step.loss[1]:.7f}", f"{step.gradient_norm[1]:.6g}"),
            "same" if step.same else "differs",
        )
    return table
