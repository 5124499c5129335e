"""What became of each fault is read rightly from the run's own account."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checks
import pytest
from judge import went_on
from records import Recorded, settle
from stage import Incarnation
from watch import Tick


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


def test_when_a_run_went_on(tmp_path: Path) -> None:
    """A step that was under way when it happened shows nothing, and a driver's recovery begins
    with the next one's start."""
    watch = SimpleNamespace(ticks=[Tick(t, int(t), t != 150) for t in (101, 102, 103, 150, 160)])
    lives = [incarnation(0.0, 104.0, "killed"), incarnation(110.0, 1000.0, "done")]
    stage: Any = SimpleNamespace(watch=watch, incarnations=lives)
    assert went_on(recorded(100.5, "reward"), stage) == 102
    assert went_on(recorded(102.5, "driver"), stage) == 160
    assert went_on(recorded(155.0, "reward"), stage) is None
