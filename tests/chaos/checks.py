"""What must hold at the end of a run, whatever was done to it. Each returns what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import sqrt
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import pyarrow.parquet as pq
from records import Recorded
from watch import Memory

from medrl.reports.lines import read_lines

SAME_LOSS = 1e-6
SETTLED_AGE_S = 60.0  # a process has loaded what it needs by then
LONG_S = 60.0  # lives that are long enough after that to show a leak
GROWTH = 0.10  # of a process's memory that is not called one
NOISE_BYTES = 48 << 20
Z = 2.58  # 99 %


def trained_once(run: Path, steps: int, prompts: int, schedule: Mapping[int, str]) -> list[str]:
    """Every draw is trained exactly once, with the prompt that the schedule has for it."""
    expected, draws = set(range(steps * prompts)), Counter[int]()
    wrong = []
    for file in sorted((run / "completions").glob("step_*.parquet")):
        groups = {
            (row["draw"], row["prompt_id"])
            for row in _rows(file, "draw", "prompt_id", "advantage")
            if row["advantage"] is not None
        }
        draws.update(draw for draw, _ in groups)
        wrong += [
            f"draw {draw} was trained with prompt {prompt}, not {schedule.get(draw)}"
            for draw, prompt in sorted(groups)
            if draw in expected and schedule.get(draw) != prompt
        ]
    problems = [f"draw {draw} was never trained" for draw in sorted(expected - draws.keys())]
    problems += [f"draw {draw} is none of the run" for draw in sorted(draws.keys() - expected)]
    problems += [f"draw {draw} was trained {n} times" for draw, n in draws.items() if n > 1]
    return problems + wrong


def schedule_of(run: Path) -> dict[int, str]:
    """Draw -> prompt, as a run recorded it."""
    rows = (_rows(file, "draw", "prompt_id") for file in (run / "completions").glob("*.parquet"))
    return {row["draw"]: row["prompt_id"] for table in rows for row in table}


def steps_contiguous(run: Path, steps: int) -> list[str]:
    """The journal has each step once, in order; and the completions of each."""
    found = [line["step"] for line in read_lines(run / "metrics.jsonl")]
    files = sorted(int(it.stem[5:]) for it in (run / "completions").glob("step_*.parquet"))
    expected = list(range(1, steps + 1))
    problems = []
    if found != expected:
        problems.append(f"metrics.jsonl: steps {_odd(found, expected)}")
    if files != expected:
        problems.append(f"completions: steps {_odd(files, expected)}")
    return problems


def versions_monotone(run: Path, steps: int) -> list[str]:
    """Receipts' versions never fall, none is left out, and all digests were equal."""
    receipts = read_lines(run / "syncs.jsonl")
    versions = [line["version"] for line in receipts]
    problems = [
        f"version {later} was pushed after {earlier}"
        for earlier, later in pairwise(versions)
        if later < earlier
    ]
    missing = sorted(set(range(steps + 1)) - set(versions))
    problems += [f"no receipt of version {version}" for version in missing]
    problems += [
        f"digests differ at version {line['version']}"
        for line in receipts
        if not line["digests_equal"]
    ]
    return problems


def same_training(run: Path, reference: Path) -> list[str]:
    """Losses to 1e-6 and completions token for token, step by step."""
    lines, others = (read_lines(it / "metrics.jsonl") for it in (run, reference))
    problems = []
    if len(lines) != len(others):
        problems.append(f"{len(lines)} steps, and {len(others)} undisturbed")
    for line, other in zip(lines, others, strict=False):
        for key in ("loss", "gradient_norm", "reward.mean"):
            if not abs(line[key] - other[key]) <= SAME_LOSS:
                problems.append(f"step {line['step']}: {key} {line[key]}, undisturbed {other[key]}")
    for file in sorted((reference / "completions").glob("step_*.parquet")):
        twin = run / "completions" / file.name
        keys = ("draw", "prompt_id", "token_ids")
        if not twin.exists() or _rows(twin, *keys) != _rows(file, *keys):
            problems.append(f"{file.stem}: other tokens than undisturbed")
    return problems


def largest_difference(run: Path, reference: Path) -> float:
    """Of the losses of two runs."""
    lines, others = (read_lines(it / "metrics.jsonl") for it in (run, reference))
    return max(
        (abs(a["loss"] - b["loss"]) for a, b in zip(lines, others, strict=False)), default=0.0
    )


def accuracy_alike(last: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Two evaluations differ by no more than chance has two samples of one model differ (99 %)."""
    n, m = last["n"], other["n"]
    share = (last["accuracy"] * n + other["accuracy"] * m) / (n + m)
    bound = Z * sqrt(share * (1 - share) * (1 / n + 1 / m)) + 1 / min(n, m)
    if abs(last["accuracy"] - other["accuracy"]) <= bound:
        return []
    return [
        f"accuracy {last['accuracy']:.3f} and undisturbed {other['accuracy']:.3f}: more than "
        f"{bound:.3f} apart"
    ]


def failures_as_ordered(run: Path, ordered: int, killed: int) -> list[str]:
    """No more completions failed than rewards were made to fail. (Fewer may: a step that is done
    again meets no fault.)"""
    failed = [
        (file.stem, row["outcome"], row["reason"])
        for file in sorted((run / "completions").glob("step_*.parquet"))
        for row in _rows(file, "outcome", "reason")
        if row["outcome"] in ("error", "timeout")
    ]
    if len(failed) <= ordered + killed:
        return []
    return [f"{len(failed)} completions failed for {ordered + killed} faults: {failed[:5]}"]


def all_recovered(records: Sequence[Recorded]) -> list[str]:
    """What was hit was noticed and came back, or something else ended its incarnation first."""
    return [
        f"fault {it.number}, {it.name} at step {it.step}: {it.outcome}"
        for it in records
        if it.outcome not in ("recovered", "overtaken", "nothing there", "at the end")
    ]


def nothing_left(what: str, names: Sequence[str]) -> list[str]:
    return [f"{what} is left: {name}" for name in names]


def memory_flat(samples: Sequence[Memory]) -> list[str]:
    """No process of the run's own kinds grows through its life."""
    return [
        f"{kind} {pid} grew from {before >> 20} to {after >> 20} MiB in {seconds:.0f} s"
        for kind, pid, before, after, seconds, _ in growth(samples)
        if kind != "other" and after > before * (1 + GROWTH) + NOISE_BYTES
    ]


def growth(samples: Sequence[Memory]) -> list[tuple[str, int, int, int, float, float]]:
    """Of each long life: kind, id, bytes in its first and last third, seconds between the ends,
    and the slope in bytes a second."""
    lives: dict[tuple[str, int], list[Memory]] = {}
    for one in samples:
        if one.age_s >= SETTLED_AGE_S:
            lives.setdefault((one.kind, one.pid), []).append(one)
    found = []
    for (kind, pid), life in lives.items():
        seconds = life[-1].time - life[0].time
        if seconds < LONG_S:
            continue
        third = len(life) // 3
        before = int(median(it.bytes for it in life[:third]))
        after = int(median(it.bytes for it in life[-third:]))
        slope = linear_regression([it.time for it in life], [it.bytes for it in life]).slope
        found.append((kind, pid, before, after, seconds, slope))
    return found


def _rows(file: Path, *columns: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(file, columns=list(columns)).to_pylist()
    return rows


def _odd(found: Sequence[int], expected: Sequence[int]) -> str:
    twice = [step for step, n in Counter(found).items() if n > 1]
    missing = sorted(set(expected) - set(found))
    return f"missing {missing[:5]}, twice {twice[:5]}, {len(found)} of {len(expected)}"
