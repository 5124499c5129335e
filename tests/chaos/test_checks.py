"""Each check of the soak finds what it is for: given a run that is right it says nothing, and given
one with a planted fault it says which."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import checks
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import FAULTS, cut_in_half, flip_a_byte
from plan import FULL, SHORT, fewer, plan
from records import Recorded, settle
from stage import Incarnation
from watch import Memory, Watch, marked, shared_memory_of

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
    assert checks.memory_flat(life("driver", grows=1 << 20, seconds=50)) == []  # still starting
    (problem,) = checks.memory_flat(life("driver", grows=1 << 20))
    assert problem.startswith("driver 7 grew from 449 to 649 MiB")
    ((*_, slope),) = checks.growth(life("driver", grows=1 << 20))
    assert slope == pytest.approx(1 << 20)


# What became of faults


def recorded(time: float, who: str = "engine", **other: Any) -> Recorded:
    usual: dict[str, Any] = {"number": 1, "name": "killed", "is_kill": True, "phase": "equal"}
    usual |= {"time": time, "who": who, "step": 3, "hit": "process 1"}
    return Recorded(**(usual | other))


def line(time: float, event: str, who: str = "engine 0", seconds: float = 0.0) -> dict[str, Any]:
    cause = f"{who} died (receive weights): killed"
    return {"time": time, "event": event, "who": who, "seconds": seconds, "cause": cause}


def incarnation(began: float, ended: float, how: str) -> Incarnation:
    return Incarnation(began=began, temporary=Path(), ended=ended, how=how)


WHOLE = [incarnation(0.0, 1000.0, "done")]


def test_a_fault_and_its_recovery() -> None:
    record = recorded(100.0)
    assert not settle([record], [line(101.0, "left"), line(130.0, "returned", seconds=29.0)], WHOLE)
    assert (record.outcome, record.seconds, record.served_after_s) == ("recovered", 30.0, 29.0)
    assert record.in_a_sync
    assert checks.all_recovered([record]) == []


@pytest.mark.parametrize(
    ("lines", "outcome"),
    [
        ([], "not noticed"),
        ([line(50.0, "left"), line(60.0, "returned")], "not noticed"),
        ([line(400.0, "left"), line(430.0, "returned")], "not noticed"),
        ([line(101.0, "left"), line(120.0, "given up")], "given up"),
        ([line(101.0, "left", "learner"), line(120.0, "returned", "learner")], "not noticed"),
    ],
)
def test_a_fault_that_was_not_recovered_from(lines: list[dict[str, Any]], outcome: str) -> None:
    record = recorded(100.0)
    settle([record], lines, WHOLE)
    assert record.outcome == outcome
    assert checks.all_recovered([record])


def test_a_fault_that_a_kill_of_everything_overtakes() -> None:
    lives = [incarnation(0.0, 110.0, "killed"), incarnation(111.0, 1000.0, "done")]
    noticed, unseen = recorded(100.0), recorded(109.0, "learner")
    settle([noticed, unseen], [line(101.0, "left")], lives)
    assert (noticed.outcome, unseen.outcome) == ("overtaken", "overtaken")


def test_two_faults_in_one_outage_and_one_outage_without_a_fault() -> None:
    first, second = recorded(100.0), recorded(110.0)
    lines = [line(101.0, "left"), line(140.0, "returned", seconds=39.0)]
    lines += [line(500.0, "left", "engine 1"), line(530.0, "returned", "engine 1")]
    (unasked,) = settle([first, second], lines, WHOLE)
    assert (first.outcome, second.outcome) == ("recovered", "recovered")
    assert second.seconds == 30.0
    assert unasked.left == 500.0


def test_a_run_that_does_not_go_on() -> None:
    dead = [incarnation(0.0, 200.0, "killed"), incarnation(201.0, 400.0, "died")]
    record = recorded(200.0, "driver")
    settle([record], [], dead)
    assert record.outcome == "the run did not go on"
    settle([went_on := recorded(200.0, "driver", up=260.0)], [], WHOLE)
    assert (went_on.outcome, went_on.seconds) == ("recovered", 60.0)


# What is left


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"], env=os.environ | {"REWARD_CHAOS": "a mark"})
    yield process
    process.kill()
    process.wait()


def test_a_process_that_is_left(sleeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """Seen by who it descends from, and, whatever became of its parents, by its mark."""
    watch = Watch(tmp_path / "metrics.jsonl")
    watch.seen.add(psutil.Process(sleeper.pid))
    deadline = time.monotonic() + 20
    while not marked("a mark") and time.monotonic() < deadline:
        time.sleep(0.01)  # it has only just started its program
    (left,), (also,) = watch.left(), marked("a mark")
    assert "sleep 60" in left
    assert "sleep 60" in also
    sleeper.kill()
    sleeper.wait()
    assert (watch.left(), marked("a mark")) == ([], [])
    assert checks.nothing_left("process", [left]) == [f"process is left: {left}"]


def test_shared_memory_that_is_left(tmp_path: Path) -> None:
    """Only what the run had mapped counts: the machine is not the run's alone."""
    watch = Watch(tmp_path / "metrics.jsonl")
    ours, others = SharedMemory(create=True, size=4096), "nobody's"
    try:
        watch.shared = shared_memory_of(os.getpid())
        assert ours.name in watch.shared_left()
        assert others not in watch.shared
    finally:
        ours.close()
        ours.unlink()
    assert ours.name not in watch.shared_left()


# The plan


def test_the_soak_is_as_large_as_it_says() -> None:
    """At least 100 faults of all kinds, half of them kills of engines, ranks and the driver."""
    kills = {fault.name for fault in FAULTS if fault.is_kill}
    counts = dict.fromkeys((fault.name for fault in FAULTS), 0)
    for phase in FULL.values():
        for name, count in phase.items():
            counts[name] += count
    assert min(counts.values()) > 0
    assert sum(counts.values()) >= 100
    assert 2 * sum(counts[name] for name in kills) >= sum(counts.values())
    assert 8 <= sum(sum(of.values()) for of in SHORT.values()) <= 12
    fewest = fewer(FULL, 12)
    assert 6 <= sum(sum(of.values()) for of in fewest.values()) <= 20


def test_a_seed_is_a_plan() -> None:
    """All faults, in an order and at moments that the seed decides, none before `first`."""
    counts = FULL["equal"]
    plans = [plan(counts, random.Random(seed), first=11, steps=200) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]
    for planned in plans:
        assert sorted(it.fault.name for it in planned) == sorted(
            name for name, n in counts.items() for _ in range(n)
        )
        steps = [it.step for it in planned if it.step]
        assert steps == sorted(steps)
        assert 11 <= min(steps) <= max(steps) < 198
        phases = dataclasses.asdict(planned[0])["fault"]["phases"]
        assert phases


def test_a_phase_has_its_own_faults_only() -> None:
    phases = {fault.name: fault.phases for fault in FAULTS}
    for sizes in (FULL, SHORT):
        for phase, counts in sizes.items():
            assert all(phase in phases[name] for name in counts)


def test_damage_is_damage(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    flip_a_byte(file)
    flipped = file.read_bytes()
    assert len(flipped) == 10
    assert flipped != b"0123456789"
    cut_in_half(file)
    assert file.read_bytes() == flipped[:5]


def test_it_is_a_program() -> None:
    soak = Path(__file__).with_name("soak.py")
    done = subprocess.run([sys.executable, soak, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--seed" in done.stdout
