"""Each alarm is raised by a made series that shows its fault, once, and by no healthy series."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import make_receipt, make_scored, make_update

from medrl.actors.types import ScoredGroup
from medrl.cluster.alarm_rules import RULES, Bounds
from medrl.cluster.alarms import FIRST, QUIET, Alarm, Alarms
from medrl.cluster.gap import LIMITS, GapGate
from medrl.cluster.journal import Journal
from medrl.reports.lines import read_lines

MIB = 2**20
BOUNDS = Bounds(
    completions=8,
    max_tokens=16,
    staleness=0,
    max_replaced=0,
    max_failed_fraction=0.1,
    updates_per_batch=1,
    importance_cap=0.0,
)
STEP: dict[str, Any] = {
    "groups": 16,
    "zero_variance_groups": 4,
    "identical_groups": 1,
    "failed_completions": 0,
    "truncated_completions": 2,
    "replaced_groups": 0,
    "reward.mean": 1.0,
    "reward.accuracy": 0.5,
    "reward.format": 0.8,
    "entropy": 0.4,
    "clip_fraction": 0.0,
    "importance.mean": 1.0,
    "tokens.per_completion": 7.0,
    "staleness.max": 0,
    "seconds.step": 1.0,
    "seconds.idle_rollout": 0.5,
    "memory.driver_bytes": 700 * MIB,
}

# The 80 steps of `make demo`, as measured.
# fmt: off
ENTROPY = [
    0.411, 0.417, 0.374, 0.335, 0.319, 0.274, 0.268, 0.23, 0.196, 0.18, 0.149, 0.162, 0.121,
    0.113, 0.115, 0.092, 0.087, 0.092, 0.047, 0.047, 0.068, 0.063, 0.058, 0.081, 0.051, 0.047,
    0.042, 0.053, 0.04, 0.053, 0.047, 0.039, 0.063, 0.027, 0.038, 0.059, 0.037, 0.027, 0.024,
    0.048, 0.032, 0.023, 0.022, 0.043, 0.037, 0.039, 0.02, 0.028, 0.041, 0.037, 0.021, 0.025,
    0.023, 0.023, 0.018, 0.026, 0.031, 0.023, 0.026, 0.031, 0.021, 0.034, 0.029, 0.024, 0.037,
    0.024, 0.03, 0.018, 0.022, 0.02, 0.024, 0.018, 0.016, 0.016, 0.016, 0.026, 0.017, 0.03,
    0.031, 0.031,
]
ACCURACY = [
    0.22, 0.24, 0.34, 0.38, 0.45, 0.57, 0.41, 0.59, 0.58, 0.58, 0.73, 0.64, 0.7, 0.86, 0.78,
    0.88, 0.84, 0.73, 0.95, 0.91, 0.86, 0.84, 0.92, 0.9, 0.92, 0.93, 0.92, 0.93, 0.98, 0.87,
    0.91, 0.98, 0.8, 0.85, 0.98, 0.85, 0.95, 0.97, 0.99, 0.87, 0.91, 0.94, 0.99, 0.88, 0.89,
    0.93, 0.97, 0.93, 0.84, 0.91, 0.92, 0.97, 0.99, 0.98, 1.0, 0.91, 0.94, 0.97, 0.91, 0.91,
    0.89, 0.93, 0.91, 0.99, 0.93, 0.96, 0.91, 0.93, 0.92, 0.99, 0.96, 0.98, 0.98, 0.98, 1.0,
    0.98, 0.98, 0.92, 0.88, 0.93,
]
FORMAT = [
    0.44, 0.42, 0.57, 0.59, 0.62, 0.8, 0.75, 0.84, 0.84, 0.9, 0.94, 0.91, 0.96, 0.98, 0.95,
    0.98, 0.97, 0.96, 0.98, 0.98, 0.98, 0.98, 0.97, 0.94, 0.98, 0.98, 0.97, 0.99, 1.0, 0.99,
    0.99, 1.0, 0.98, 0.98, 0.99, 0.99, 0.99, 0.98, 0.99, 0.98, 0.99, 0.99, 1.0, 0.99, 1.0, 1.0,
    0.98, 0.99, 0.98, 1.0, 0.99, 0.97, 1.0, 0.99, 1.0, 0.99, 0.98, 0.98, 0.99, 0.98, 0.99, 0.99,
    1.0, 0.99, 0.99, 0.98, 0.99, 1.0, 0.99, 1.0, 0.98, 0.98, 0.99, 0.98, 1.0, 0.98, 0.98, 1.0,
    0.98, 1.0,
]
ZERO_VARIANCE = [
    0, 0, 1, 0, 1, 1, 0, 1, 0, 0, 2, 1, 4, 8, 6, 6, 4, 3, 10, 10, 9, 6, 7, 9, 13, 11, 9, 11, 13,
    8, 10, 13, 10, 12, 14, 10, 11, 12, 14, 10, 11, 14, 15, 13, 12, 11, 12, 13, 9, 11, 15, 12,
    15, 14, 16, 9, 11, 13, 10, 11, 15, 13, 15, 15, 11, 11, 11, 15, 14, 15, 13, 14, 14, 14, 16,
    14, 14, 14, 12, 14,
]
IDENTICAL = [
    0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 2, 1, 3, 8, 6, 6, 4, 3, 10, 10, 9, 6, 7, 9, 13, 11, 9, 11, 13,
    8, 10, 13, 10, 12, 14, 10, 11, 12, 14, 10, 11, 14, 15, 13, 11, 11, 12, 13, 9, 11, 15, 12,
    15, 14, 16, 9, 11, 13, 10, 11, 15, 13, 15, 15, 11, 11, 11, 15, 14, 15, 13, 14, 14, 14, 16,
    14, 14, 14, 12, 14,
]
# fmt: on


def alarms_of(series: Sequence[dict[str, Any]], bounds: Bounds = BOUNDS) -> list[Alarm]:
    alarms = Alarms(bounds, GapGate(LIMITS["float32"]))
    lines = [STEP | changes | {"step": step} for step, changes in enumerate(series, start=1)]
    return [alarm for line in lines for alarm in alarms.look(line)]


def run(calm: int, trouble: int, **changes: Any) -> list[dict[str, Any]]:
    """A series that is calm, then has the trouble."""
    return [{}] * calm + [changes] * trouble


FAULTS: list[tuple[str, list[dict[str, Any]], dict[str, Any], int, str]] = [
    # name, series, bounds, step it is raised at, what its sentence holds
    (
        "no gradient",
        run(10, 5, zero_variance_groups=16),
        {},
        13,
        r"since step 11 in each of 3 steps .*mean reward 1\.00",
    ),
    (
        "entropy collapse",
        run(10, 10, entropy=0.015),
        {},
        20,
        r"entropy is 0\.015 .* it was 0\.4 .* accuracy is 0\.50",
    ),
    (
        "format up, accuracy down",
        [{"reward.format": 0.5 + i / 50, "reward.accuracy": 0.6 - i / 50} for i in range(20)],
        {},
        20,
        r"format rose from 0\.59 to 0\.79 while accuracy fell from 0\.51 to 0\.31 over 20 steps",
    ),
    (
        "length",
        run(10, 5, truncated_completions=64),
        {},
        13,  # half of the completions of three of the last five steps
        r"7 tokens, 7 in the first steps, and 31% are cut off at rollout\.max_tokens \(16\)",
    ),
    (
        "length",
        [{"tokens.per_completion": 6.0 + i / 4} for i in range(24)],
        {},
        19,  # 6.5 in the first steps, 10 in the last
        r"completions have 10 tokens, 6 in the first steps",
    ),
    (
        "identical completions",
        run(10, 3, identical_groups=16, entropy=0.3),
        {},
        13,
        r"in 48 of 48 groups of 3 steps all 8 completions",
    ),
    (
        "identical completions",  # one of two engines samples greedily
        run(10, 3, identical_groups=8, entropy=0.5),
        {},
        13,
        r"in 24 of 48 groups .* entropy is 3\.5 nats",
    ),
    (
        "failures",
        run(10, 5, failed_completions=8),
        {},
        15,
        r"40 of 640 completions of 5 steps .* above 10% of a step",
    ),
    (
        "staleness",
        run(5, 10, **{"staleness.max": 2}),
        {"staleness": 2, "importance_cap": 0.0},
        15,
        r"as old as rollout\.staleness allows \(2\) while engines waited 50%",
    ),
    (
        "memory",
        [{"memory.driver_bytes": (700 + 40 * i) * MIB} for i in range(60)],
        {},
        40,
        r"the driver grew by 1\.0 GiB since the first steps, .* by 1200 MiB in 40 steps",
    ),
    (
        "idle correction",
        run(0, 20, **{"importance.mean": 1 + 1e-7}),
        {"importance_cap": 2.0},
        20,
        r"importance_cap is 2, but .* 20 steps \(rollout\.staleness is 0\).*; set it to 0",
    ),
    (
        "idle clip",
        run(0, 20),
        {"updates_per_batch": 4},
        20,
        r"not one token was clipped in 20 steps of 4 updates",
    ),
    ("idle filter", run(0, 20), {"max_replaced": 8}, 20, r"kept every group of 20 steps"),
    (
        "idle filter",
        run(0, 20, replaced_groups=8),
        {"max_replaced": 8},
        20,
        r"rollout\.max_replaced allows \(8\) in each of 20 steps",
    ),
]


@pytest.mark.parametrize(("name", "series", "changes", "step", "sentence"), FAULTS)
def test_a_fault_raises_its_alarm_once_with_its_numbers(
    name: str, series: list[dict[str, Any]], changes: dict[str, Any], step: int, sentence: str
) -> None:
    (alarm,) = alarms_of(series, replace(BOUNDS, **changes))
    assert (alarm.name, alarm.event, alarm.step) == (name, "began", step)
    assert alarm.message.startswith(f"{name}: since step ")
    assert re.search(sentence, alarm.message), alarm.message


def test_every_alarm_has_a_test() -> None:
    assert {fault[0] for fault in FAULTS} == {rule.name for rule in RULES}


IDLE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"importance.mean": 1 + 1e-7}, {"importance_cap": 2.0}, "idle correction: learner.importance"),
    ({}, {"updates_per_batch": 4}, "idle clip: not one token was clipped in 7 steps"),
    ({}, {"max_replaced": 8}, r"idle filter: dynamic sampling \(rollout.max_replaced = 8\) kept"),
]


@pytest.mark.parametrize(("line", "changes", "sentence"), IDLE)
def test_what_did_nothing_in_a_short_run_is_said_at_its_end(
    tmp_path: Path, line: dict[str, Any], changes: dict[str, Any], sentence: str
) -> None:
    """No alarm has seen enough steps; and what worked once in the run is not named."""
    said: list[str] = []
    lines = [STEP | line | {"step": step} for step in range(1, 8)]
    path = tmp_path / "metrics.jsonl"
    alarms = Alarms(replace(BOUNDS, **changes), GapGate(LIMITS["float32"]), said.append)
    journal = Journal(tmp_path, alarms=alarms)
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    journal.conclude()
    assert len(said) == 1
    assert re.match("of the whole run: " + sentence, said[0])
    busy = {"importance.mean": 0.98, "clip_fraction": 0.01, "replaced_groups": 1}
    path.write_text("".join(json.dumps(one) + "\n" for one in [*lines, STEP | busy]))
    journal.conclude()
    assert len(said) == 1


def test_the_demos_own_numbers_raise_nothing() -> None:
    series = [
        {
            "entropy": entropy,
            "reward.accuracy": accuracy,
            "reward.format": form,
            "zero_variance_groups": same,
            "identical_groups": identical,
            "truncated_completions": 0,
            "memory.driver_bytes": (676 if step == 0 else 714 + step // 6) * MIB,
        }
        for step, (entropy, accuracy, form, same, identical) in enumerate(
            zip(ENTROPY, ACCURACY, FORMAT, ZERO_VARIANCE, IDENTICAL, strict=True)
        )
    ]
    assert alarms_of(series) == []


# Each is one number away from its fault.
HEALTHY: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    (run(0, 50), {}),
    (run(0, 50, zero_variance_groups=15), {}),
    (run(10, 30, entropy=0.015, **{"reward.accuracy": 0.9}), {}),  # solved
    ([{"reward.format": 0.5 + i / 50, "reward.accuracy": 0.6} for i in range(20)], {}),
    (run(10, 30, **{"reward.accuracy": 0.3}), {}),  # down, but format is not up
    (run(10, 30, **{"tokens.per_completion": 7.9}), {}),
    (run(10, 30, truncated_completions=30), {}),
    (run(10, 30, identical_groups=15, entropy=0.1), {}),  # as late in the demo
    (run(10, 30, failed_completions=6), {}),
    (run(10, 30, **{"staleness.max": 2, "seconds.idle_rollout": 0.1}), {"staleness": 2}),
    ([{"staleness.max": i % 3} for i in range(30)], {"staleness": 2}),
    (run(5, 60, **{"memory.driver_bytes": 1900 * MIB}), {}),  # a step up is no leak
    (run(0, 40, **{"importance.mean": 0.999}), {"importance_cap": 2.0, "staleness": 1}),
    ([{"clip_fraction": 0.0 if i % 15 else 1e-3} for i in range(60)], {"updates_per_batch": 4}),
    ([{"replaced_groups": 8 if i % 15 else 7} for i in range(60)], {"max_replaced": 8}),
]


@pytest.mark.parametrize(("series", "changes"), HEALTHY)
def test_what_is_near_a_fault_raises_nothing(
    series: list[dict[str, Any]], changes: dict[str, Any]
) -> None:
    assert alarms_of(series, replace(BOUNDS, **changes)) == []


def test_noise_between_batches_is_no_trend() -> None:
    """Accuracy of 16 prompts a step goes up and down by itself."""
    noise = [0.2, -0.2, 0.1, -0.15, 0.18, -0.1, 0.05, -0.2, 0.15, 0.17]
    series = [
        {"reward.format": 0.5 + i / 40, "reward.accuracy": 0.5 + noise[i % 10] - (i >= 10) * 0.07}
        for i in range(20)
    ]
    assert alarms_of(series) == []


def test_an_alarm_that_comes_and_goes_is_said_once_and_its_end_once() -> None:
    series = run(5, 3, zero_variance_groups=16) + [
        {"zero_variance_groups": 15 if step % 4 == 0 else 16} for step in range(40)
    ]
    began, ended = alarms_of([*series, *[{}] * (QUIET + 3)])
    assert (began.event, ended.event) == ("began", "ended")
    assert (began.step, ended.step) == (8, len(series) + QUIET)
    assert ended.message == f"no gradient: raised at step 8, gone since step {len(series) + 1}"


def test_steps_without_the_numbers_are_not_judged() -> None:
    """Supervised fine-tuning has no groups, other rewards no accuracy, older runs fewer keys."""
    alarms = Alarms(BOUNDS, GapGate(LIMITS["float32"]))
    for step in range(1, 60):
        line = {"step": step, "loss": 1.0, "memory.driver_bytes": 700 * MIB}
        assert alarms.look(line) == []


def made(draw: int, version: int) -> ScoredGroup:
    """A group of completions that differ."""
    scored = make_scored(draw, version=version)
    completions = tuple(
        replace(completion, token_ids=(5, 6, 7 + place))
        for place, completion in enumerate(scored.group.completions)
    )
    return replace(scored, group=replace(scored.group, completions=completions))


def record(journal: Journal, step: int, same: bool = True) -> None:
    batch = [made(0, version=step - 1), made(1, version=step - 1)]
    update = replace(make_update(batch), zero_variance_groups=2 if same else 0)
    journal.record_step(step, batch, update, make_receipt(step), idle_rollout=0.1)


def make_journal(folder: Path, said: list[str]) -> Journal:
    return Journal(folder, alarms=Alarms(BOUNDS, GapGate(LIMITS["float32"]), said.append))


def test_alarms_are_written_counted_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    journal = make_journal(tmp_path, said)
    for step in range(1, 5):
        record(journal, step)
    (line,) = read_lines(tmp_path / "alarms.jsonl")
    assert (line["step"], line["name"], line["event"]) == (3, "no gradient", "began")
    assert said == [f"alarm: {line['message']}"]
    assert [one["alarms"] for one in read_lines(tmp_path / "metrics.jsonl")] == [0, 0, 1, 1]


def test_a_resumed_run_takes_back_later_alarms_and_repeats_no_earlier_one(tmp_path: Path) -> None:
    first = make_journal(tmp_path, [])
    for step in range(1, 4 + QUIET):
        record(first, step, same=step <= 3)
    assert [one["event"] for one in read_lines(tmp_path / "alarms.jsonl")] == ["began", "ended"]
    said: list[str] = []
    second = make_journal(tmp_path, said)
    second.rewind(5)
    assert [one["event"] for one in read_lines(tmp_path / "alarms.jsonl")] == ["began"]
    record(second, 6)  # same scores again: 4 and 5 had not, so nothing new begins
    for step in range(7, 7 + FIRST):
        record(second, step)
    assert said == []  # the alarm of step 3 never ended
    assert len(read_lines(tmp_path / "alarms.jsonl")) == 1
