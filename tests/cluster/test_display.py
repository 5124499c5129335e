"""What people see: one live table on a terminal, plain lines in a pipe, plots."""

import io
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from rich.console import Console

from medrl.cluster.display import Display
from medrl.reports import plots

NUMBERS: dict[str, Any] = {
    "reward.mean": 1.5,
    "reward.accuracy": 0.75,
    "entropy": 0.3,
    "gradient_norm": 0.5,
    "logprob_gap.max": 2e-6,
    "tokens.per_second": 900.0,
    "tokens.per_completion": 7.0,
    "staleness.max": 0,
    "groups": 16,
    "zero_variance_groups": 3,
    "seconds.step": 2.0,
    "sync.canary_gap": 1e-6,
}


def step(number: int, **changed: float) -> dict[str, Any]:
    return {"step": number, **NUMBERS, **changed}


def evaluation(number: int, accuracy: float) -> dict[str, Any]:
    kinds = {"by_modality": {"CT": accuracy}, "by_question_type": {"Grading": accuracy}}
    counts = {"n_by_modality": {"CT": 4}, "n_by_question_type": {"Grading": 4}}
    whole = {"accuracy": accuracy, "format": 1.0, "n": 4, "split": "test", "step": number}
    return {**whole, **kinds, **counts}


def test_in_a_pipe_a_long_run_is_few_lines_without_codes() -> None:
    out = io.StringIO()
    with Display(name="x", steps=5000, console=Console(file=out, width=120)) as display:
        for number in range(1, 5001):
            display.on_step(step(number))
    lines = out.getvalue().splitlines()
    assert 20 <= len(lines) <= 50
    assert lines[-1].startswith("step 5000/5000 · reward 1.50 · accuracy 0.75")
    assert lines[-1].endswith("left 0:00")
    assert "\x1b" not in out.getvalue()


@pytest.fixture
def terminal() -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)


def test_on_a_terminal_notes_and_evaluations_stay_to_be_read(terminal: Console) -> None:
    """The live table is wiped at the end; what was left out of the data must not go with it."""
    with Display(name="x", steps=9, console=terminal) as display:
        display.say("starting")
        display.note("left out 5 prompts")
        display.on_eval(evaluation(0, 0.25))
    printed = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "[x] left out 5 prompts\n" in printed
    assert "[x] held out, step 0: accuracy 0.250" in printed
    assert "[x] starting" not in printed


def test_the_live_table_has_a_line_a_number_under_its_bar(terminal: Console) -> None:
    display = Display(name="x", steps=9, console=terminal)
    display.say("evaluating")
    display.on_step(step(3))
    with terminal.capture() as shown:
        terminal.print(display._draw())
    lines = [line.rstrip() for line in shown.get().splitlines()]
    assert lines[0] == "medrl · x · training"  # not what was said before the step
    assert set(lines[1]) <= set("━╸╺")
    assert [line.split()[0] for line in lines[2:5]] == ["step", "reward", "accuracy"]


def test_plots_leave_bars_free_of_the_legend_and_smooth_the_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [step(n, **{"seconds.step": 1.0 + n % 2}) for n in range(1, 31)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    evals = [evaluation(0, 0.5), evaluation(30, 1.0)]
    (tmp_path / "evals.jsonl").write_text("".join(json.dumps(e) + "\n" for e in evals))
    figures: dict[str, Any] = {}
    save = plots._save

    def keep(figure: Any, path: Path) -> Path:
        figures[path.stem] = figure
        return save(figure, path)

    monkeypatch.setattr(plt, "close", lambda _: None)
    monkeypatch.setattr(plots, "_save", keep)
    drawn = plots.draw_plots(tmp_path)
    assert sorted(path.name for path in drawn) == ["accuracy.png", "learning.png", "seconds.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    for axis in figures["accuracy"].axes:
        legend = axis.get_legend().get_window_extent()
        assert not any(legend.overlaps(bar.get_window_extent()) for bar in axis.patches)
    (seconds,) = figures["seconds"].axes
    (smooth,) = [line for line in seconds.get_lines() if line.get_label() == "step"]
    assert max(smooth.get_ydata()) - min(smooth.get_ydata()) < 0.3  # of 1.0
