"""Each check of the soak finds what it is for: given a run that is right it says nothing, and given
one with a planted fault it says which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checks
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from watch import Memory

STEPS, PROMPTS, COMPLETIONS = 4, 2, 2
SCHEDULE = {draw: f"p{draw % 5}" for draw in range(STEPS * PROMPTS)}


def row(step: int, draw: int, **other: Any) -> dict[str, Any]:
    usual = {"step": step, "draw": draw, "prompt_id": SCHEDULE.get(draw, "p0"), "advantage": 0.5}
    return usual | {"token_ids": [draw, 7], "outcome": "ok", "reason": ""} | other


def write(folder: Path, step: int, rows: list[dict[str, Any]]) -> None:
    (folder / "completions").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "completions" / f"step_{step:06d}.parquet")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def metrics(step: int, **other: float) -> dict[str, Any]:
    return {"step": step, "loss": 0.1 * step, "gradient_norm": 1.0, "reward.mean": 0.5} | other


def receipt(version: int, **other: Any) -> dict[str, Any]:
    return {"version": version, "digests_equal": True} | other


def make_run(folder: Path) -> Path:
    for step in range(1, STEPS + 1):
        draws = range((step - 1) * PROMPTS, step * PROMPTS)
        write(folder, step, [row(step, draw) for draw in draws for _ in range(COMPLETIONS)])
    write_lines(folder / "metrics.jsonl", [metrics(step) for step in range(1, STEPS + 1)])
    write_lines(folder / "syncs.jsonl", [receipt(version) for version in (0, 1, 2, 2, 3, 4)])
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def every_check(run: Path) -> list[str]:
    return [
        *checks.trained_once(run, STEPS, PROMPTS, SCHEDULE),
        *checks.steps_contiguous(run, STEPS),
        *checks.versions_monotone(run, STEPS),
        *checks.failures_as_ordered(run, 0, 0),
    ]


def test_a_run_that_is_right_passes(run: Path, tmp_path: Path) -> None:
    assert every_check(run) == []
    assert checks.same_training(run, make_run(tmp_path / "twin")) == []
    assert checks.schedule_of(run) == SCHEDULE


@pytest.mark.parametrize(
    ("step", "rows", "said"),
    [
        (2, [row(2, 2)], "draw 3 was never trained"),
        (2, [row(2, 2), row(2, 3), row(2, 0)], "draw 0 was trained 2 times"),
        (2, [row(2, 2), row(2, 3), row(2, 8)], "draw 8 is none of the run"),
        (2, [row(2, 2), row(2, 3, advantage=None)], "draw 3 was never trained"),
        (2, [row(2, 2), row(2, 3, prompt_id="p0")], "trained with prompt p0, not p3"),
    ],
)
def test_a_draw_not_trained_once(
    run: Path, step: int, rows: list[dict[str, Any]], said: str
) -> None:
    write(run, step, rows)
    (problem,) = checks.trained_once(run, STEPS, PROMPTS, SCHEDULE)
    assert said in problem


@pytest.mark.parametrize(
    ("steps", "said"), [((1, 2, 4), "missing [3]"), ((1, 2, 2, 3, 4), "twice [2]")]
)
def test_a_step_missing_or_there_twice(run: Path, steps: tuple[int, ...], said: str) -> None:
    write_lines(run / "metrics.jsonl", [metrics(step) for step in steps])
    (problem,) = checks.steps_contiguous(run, STEPS)
    assert said in problem


def test_a_step_without_its_completions(run: Path) -> None:
    (run / "completions" / "step_000003.parquet").unlink()
    (problem,) = checks.steps_contiguous(run, STEPS)
    assert "completions" in problem


@pytest.mark.parametrize(
    ("receipts", "said"),
    [
        ([receipt(v) for v in (0, 1, 3, 2, 3, 4)], "version 2 was pushed after 3"),
        ([receipt(v) for v in (0, 1, 2, 4)], "no receipt of version 3"),
        ([receipt(v, digests_equal=v != 2) for v in range(5)], "digests differ at version 2"),
    ],
)
def test_receipts_that_are_wrong(run: Path, receipts: list[dict[str, Any]], said: str) -> None:
    write_lines(run / "syncs.jsonl", receipts)
    (problem,) = checks.versions_monotone(run, STEPS)
    assert said in problem


def test_another_training(run: Path, tmp_path: Path) -> None:
    twin = make_run(tmp_path / "twin")
    lines = [
        metrics(step, loss=0.1 * step + (2e-6 if step == 3 else 5e-7)) for step in (1, 2, 3, 4)
    ]
    write_lines(twin / "metrics.jsonl", lines)
    (problem,) = checks.same_training(twin, run)
    assert problem.startswith("step 3: loss")
    assert checks.largest_difference(twin, run) == pytest.approx(2e-6)
    make_run(twin)
    write(twin, 4, [row(4, draw, token_ids=[draw, 8]) for draw in (6, 6, 7, 7)])
    assert checks.same_training(twin, run) == ["step_000004: other tokens than undisturbed"]
    write_lines(twin / "metrics.jsonl", [metrics(step) for step in (1, 2, 3)])
    assert len(checks.same_training(twin, run)) == 2


def test_a_loss_that_is_no_number(run: Path, tmp_path: Path) -> None:
    twin = make_run(tmp_path / "twin")
    write_lines(twin / "metrics.jsonl", [metrics(s, loss=float("nan")) for s in (1, 2, 3, 4)])
    assert len(checks.same_training(twin, run)) == 4


@pytest.mark.parametrize(
    ("accuracy", "alike"), [(0.98, True), (0.96, True), (0.93, False), (0.6, False)]
)
def test_an_accuracy_that_chance_does_not_explain(accuracy: float, alike: bool) -> None:
    found = checks.accuracy_alike({"accuracy": accuracy, "n": 480}, {"accuracy": 0.98, "n": 480})
    assert (found == []) == alike


def test_completions_that_failed_without_an_order(run: Path) -> None:
    failed = row(1, 0, outcome="timeout", reason="took longer than 3 s")
    write(run, 1, [failed, failed, row(1, 0), row(1, 1)])
    assert checks.failures_as_ordered(run, 1, 1) == []
    (problem,) = checks.failures_as_ordered(run, 1, 0)
    assert "2 completions failed for 1 faults" in problem


def life(kind: str, grows: int, seconds: int = 300) -> list[Memory]:
    start = 400 << 20
    return [Memory(float(t), 7, kind, 60.0 + t, start + grows * t) for t in range(seconds)]


def test_memory_that_grows() -> None:
    assert checks.memory_flat(life("driver", grows=10_000)) == []
    assert checks.memory_flat(life("driver", grows=9 << 20, seconds=50)) == []  # too short to tell
    (problem,) = checks.memory_flat(life("driver", grows=1 << 20))
    assert problem.startswith("driver 7 grew from 449 to 649 MiB")
    ((*_, slope),) = checks.growth(life("driver", grows=1 << 20))
    assert slope == pytest.approx(1 << 20)
