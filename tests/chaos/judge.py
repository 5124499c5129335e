"""Look at a run that is over: hold it against the checks, and take its numbers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import checks
from records import Recorded, settle
from sizes import Size
from stage import Stage
from watch import Memory, marked

Found = tuple[str, list[str]]  # a check, and what it has found wrong

GONE_WITHIN_S = 20.0  # of the driver's end, all it started
MEANT_TO_STAY = ("ray", "torchinductor_")  # Ray's logs, torch's cache
SETTLED_S = 20.0  # of training
THINNED_S = 10.0  # between the samples of memory that are kept


def left_of(stage: Stage) -> Iterator[Found]:
    """What is left of the run, once it had its time to be gone."""
    deadline = time.monotonic() + GONE_WITHIN_S
    while (stage.watch.left() or marked(stage.mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    files = [
        f"{life.temporary.name}/{it.name}"
        for life in stage.incarnations
        for it in life.temporary.iterdir()
        if not it.name.startswith(MEANT_TO_STAY)
    ]
    processes = [*stage.watch.left(), *marked(stage.mark)]
    yield "no process left", checks.nothing_left("process", processes)
    yield "no shared memory left", checks.nothing_left("shared memory", stage.watch.shared_left())
    yield "no temporary file left", checks.nothing_left("temporary file", files)


def journal_of(stage: Stage, size: Size, steps: int, schedule: dict[int, str]) -> Iterator[Found]:
    """What its journal has to say, whatever was done to it."""
    run = stage.run_dir
    yield "each draw trained once", checks.trained_once(run, steps, size.prompts, schedule)
    yield "steps contiguous", checks.steps_contiguous(run, steps)
    yield "versions monotone, digests equal", checks.versions_monotone(run, steps)
    yield "memory flat", checks.memory_flat(settled_memory(stage))


def recoveries(stage: Stage, records: Sequence[Recorded]) -> tuple[Found, list[dict[str, Any]]]:
    """Whether every fault was recovered from; and the outages that none accounts for."""
    for record in records:
        if record.who not in ("engine", "learner"):
            record.up = went_on(record, stage)
    unasked = settle(records, stage.lines("faults"), stage.incarnations)
    told = [{"who": it.who, "cause": it.cause, "seconds": it.seconds} for it in unasked]
    return ("every fault recovered from", checks.all_recovered(records)), told


def went_on(record: Recorded, stage: Stage) -> float | None:
    """When the first step was done that began after the fault; None: there was none."""
    since, skipped = record.time, 1  # the step that was under way
    if record.who == "driver":
        since, skipped = next((it.began for it in stage.incarnations if it.began > since), since), 0
    ticks = [it.time for it in stage.watch.ticks if it.forward and it.time > since]
    return ticks[skipped] if len(ticks) > skipped else None


def rewards_of(stage: Stage, records: Sequence[Recorded]) -> Found:
    ordered = sum(it.name.startswith("reward: ") for it in records)
    killed = sum(it.name == "reward process killed" for it in records)
    wrong = checks.failures_as_ordered(stage.run_dir, ordered, killed)
    return "no other completion failed than was made to", wrong


def last_evaluation(run: Path) -> dict[str, Any]:
    last: dict[str, Any] = json.loads((run / "evals.jsonl").read_text().splitlines()[-1])
    return last


def growth_of(stage: Stage) -> list[tuple[str, int, int, int, float, float]]:
    return [it for it in checks.growth(settled_memory(stage)) if it[0] != "other"]


def settled_memory(stage: Stage) -> list[Memory]:
    """From when an incarnation trains: its first steps load what all others use."""
    lives = [(it.up + SETTLED_S, it.ended) for it in stage.incarnations if it.up and it.ended]
    return [
        sample
        for sample in stage.watch.memory
        if any(began <= sample.time < ended for began, ended in lives)
    ]


def account(stage: Stage) -> dict[str, Any]:
    """What the report's picture is drawn from."""
    kept: dict[tuple[int, int], tuple[int, int, str, int]] = {}
    for it in stage.watch.memory:
        if it.kind != "other":
            kept[it.pid, int(it.time / THINNED_S)] = (int(it.time), it.pid, it.kind, it.bytes)
    return {
        "incarnations": [
            asdict(it) | {"temporary": it.temporary.name} for it in stage.incarnations
        ],
        "ticks": [(round(it.time, 1), it.step) for it in stage.watch.ticks],
        "memory": list(kept.values()),
        "growth": growth_of(stage),
    }
