"""What a benchmark is: the same work done by us and by another, in pairs, in one run.

What counts is the ratio, another's cost over ours, for seconds are a machine's. Runs come in pairs
whose order alternates, so that what disturbs the machine meets both. A pair gives one ratio; their
median is reported, with the least and the most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

from medrl.bench.facts import Fact, Refused

LEAST_PAIRS = 3
RATIO = "ratio"

Side = Callable[[], float | None]
"""Do the work once. Returns its cost (seconds, bytes: less is better); None: the frame times it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One line of a benchmark's table: one piece of work, measured in pairs and known to be done.

    Raises `Refused` for a run that is not to be reported.
    """

    name: str
    ours: tuple[float, ...]  # cost of each run, in `unit`
    other: tuple[float, ...]  # likewise, pair by pair
    unit: str  # "s a step", "MiB"
    facts: tuple[Fact, ...]  # what shows that the work was done; not empty
    settings: Mapping[str, object]
    numbers: Mapping[str, float] = field(default_factory=dict)  # found beside it, by name and unit

    def __post_init__(self) -> None:
        if len(self.ours) != len(self.other) or len(self.ours) < LEAST_PAIRS:
            raise Refused(
                f"{self.name}: {len(self.ours)} runs of ours and {len(self.other)} of the other, "
                f"needs at least {LEAST_PAIRS} pairs"
            )
        if not all(0 < cost < float("inf") for cost in (*self.ours, *self.other)):
            raise Refused(f"{self.name}: costs {self.ours} and {self.other} must be above 0")
        if not self.facts:
            raise Refused(f"{self.name}: nothing shows that the work was done")
        for fact in self.facts:
            fact.check()

    @property
    def ratios(self) -> tuple[float, ...]:
        """Of each pair: the other's cost over ours. Above 1 ours is cheaper."""
        return tuple(b / a for a, b in zip(self.ours, self.other, strict=True))

    def number(self, name: str) -> float:
        """The median ratio, or what else was found. Raises `KeyError`."""
        return median(self.ratios) if name == RATIO else self.numbers[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a number of a case should be."""

    case: str
    number: str = RATIO
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"target of {self.case}: name at_least or at_most, and one of them")

    @property
    def wanted(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return f"<= {self.at_most:g}"

    def met(self, found: float) -> bool:
        if self.at_least is not None:
            return found >= self.at_least
        return self.at_most is not None and found <= self.at_most


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a benchmark is run."""

    short: bool = False  # for a check: the cases that need little time
    pairs: int = LEAST_PAIRS
    folder: Path = Path("runs/bench")  # for what may be used again: models, images


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A file of this package has one, called BENCHMARK."""

    name: str  # the file's
    title: str
    ours: str  # what the two sides are
    other: str
    text: str  # what is measured and how, in a paragraph
    measure: Callable[[Options], Iterable[Case]]
    targets: tuple[Target, ...] = ()
    checked: bool = True  # whether `make bench-check` runs its short form

    def run(self, options: Options, told: Callable[[Case], None] = lambda case: None) -> list[Case]:
        """Measure all cases; each is `told` as it comes, for a later one may end the process.
        Raises `Refused`, also where a target is of no case."""
        cases = {}
        for case in self.measure(options):
            cases[case.name] = case
            told(case)
        for target in () if options.short else self.targets:
            if target.case not in cases:
                raise Refused(f"{self.name}: no case {target.case!r} was measured for its target")
            cases[target.case].number(target.number)
        return list(cases.values())


def paired(
    ours: Side, other: Side, pairs: int, *, warm_up: bool = True
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Costs of each run of both, pair by pair; the first of a pair is the second of the next.
    `warm_up`: run both once before, uncounted."""
    sides: dict[Literal["ours", "other"], Side] = {"ours": ours, "other": other}
    costs: dict[str, list[float]] = {"ours": [], "other": []}
    if warm_up:
        ours(), other()
    for pair in range(pairs):
        for name in sides if pair % 2 == 0 else reversed(sides):
            costs[name].append(_cost(sides[name]))
    return tuple(costs["ours"]), tuple(costs["other"])


def _cost(side: Side) -> float:
    began = time.perf_counter()
    cost = side()
    return time.perf_counter() - began if cost is None else cost
