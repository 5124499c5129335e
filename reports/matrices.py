"""Trained on x tested on: the paper's matrices and their differences. Pure functions.

A cell is the mean over seeds. One that no run has filled is None, is shown as missing, and is left
out of every mean: it is never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from medrl.reports.results import Kind, Numbers, PlannedRun, Result

ALL_DATA = "(all data)"  # row of a run that was not restricted to one source


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A number for each source (row) and target (column)."""

    kind: Kind
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]  # [source][target]; None: missing

    def __post_init__(self) -> None:
        if len(self.cells) != len(self.sources) or any(
            len(row) != len(self.targets) for row in self.cells
        ):
            raise ValueError(
                f"{len(self.cells)} rows of {sorted({len(row) for row in self.cells})} cells for "
                f"{len(self.sources)} sources and {len(self.targets)} targets"
            )

    @property
    def source_means(self) -> tuple[float | None, ...]:
        """Over the targets, one a source."""
        return tuple(mean(row) for row in self.cells)

    @property
    def target_means(self) -> tuple[float | None, ...]:
        """Over the sources, one a target."""
        return tuple(mean(column) for column in zip(*self.cells, strict=True))

    @property
    def mean(self) -> float | None:
        """Over all cells."""
        return mean(cell for row in self.cells for cell in row)

    @property
    def in_domain(self) -> float | None:
        """The diagonal's mean: tested on what was trained on."""
        return mean(cell for source, target, cell in self._triples() if source == target)

    @property
    def transfer(self) -> float | None:
        """The mean of all cells off the diagonal."""
        return mean(
            cell for source, target, cell in self._triples() if source not in (target, ALL_DATA)
        )

    @property
    def missing(self) -> int:
        """Cells without a number."""
        return sum(cell is None for row in self.cells for cell in row)

    def _triples(self) -> Iterable[tuple[str, str, float | None]]:
        for source, row in zip(self.sources, self.cells, strict=True):
            for target, cell in zip(self.targets, row, strict=True):
                yield source, target, cell


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there; None where none is."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def targets_of(results: Iterable[Result], kind: Kind) -> tuple[str, ...]:
    """Every target of a kind that any result was tested on, sorted."""
    return _sorted({name for result in results for name in result.by(kind)})


def sources_of(
    results: Iterable[Result], kind: Kind, plan: Iterable[PlannedRun] = ()
) -> tuple[str, ...]:
    """Every source of a kind that was trained on, or will be, sorted."""
    done = {run.source for run in results if run.source_kind == kind}
    meant = {run.source for run in plan if run.source_kind == kind}
    return _sorted((done | meant) - {""})


def matrix(
    results: Sequence[Result], method: str, kind: Kind, plan: Sequence[PlannedRun] = ()
) -> Matrix:
    """A method's strict accuracy, mean over seeds. `results` are those of all methods: the axes of
    all their matrices are the same, so that they can be subtracted."""
    targets = targets_of(results, kind)
    sources = list(sources_of(results, kind, plan))
    if any(r.train != "none" and not r.source_kind for r in results):
        sources.append(ALL_DATA)
    ours = [result for result in results if result.method == method and result.train != "none"]

    def row(source: str) -> tuple[float | None, ...]:
        wanted = ("", "") if source == ALL_DATA else (kind, source)
        runs = [r.by(kind) for r in ours if (r.source_kind, r.source) == wanted]
        return tuple(mean(accuracy(run, target) for run in runs) for target in targets)

    return Matrix(
        kind=kind, sources=tuple(sources), targets=targets, cells=tuple(map(row, sources))
    )


def accuracy(numbers: Mapping[str, Numbers], target: str) -> float | None:
    return numbers[target].accuracy if target in numbers else None


def difference(later: Matrix, earlier: Matrix) -> Matrix:
    """Cell by cell; missing where either is."""
    if (later.sources, later.targets) != (earlier.sources, earlier.targets):
        raise ValueError("the difference of two matrices needs the same sources and targets")
    cells = tuple(
        tuple(None if a is None or b is None else a - b for a, b in zip(row_a, row_b, strict=True))
        for row_a, row_b in zip(later.cells, earlier.cells, strict=True)
    )
    return Matrix(kind=later.kind, sources=later.sources, targets=later.targets, cells=cells)


@dataclass(frozen=True, slots=True)
class Spread:
    """A mean over runs and how far they lie apart."""

    mean: float
    deviation: float | None  # sample standard deviation of the `count` means; None: only one
    over: str  # what `count` counts: "sources" or "seeds"
    count: int


def spread(results: Sequence[Result], measure: Callable[[Result], float | None]) -> Spread | None:
    """Mean over sources of the means over seeds, and the deviation over the sources; over the seeds
    where there is one source. None: nothing was measured."""
    by_source: dict[tuple[str, str], list[float]] = {}
    for result in results:
        if (value := measure(result)) is not None:
            by_source.setdefault((result.source_kind, result.source), []).append(value)
    if not by_source:
        return None
    groups = list(by_source.values())
    values, over = (
        ([fmean(group) for group in groups], "sources") if len(groups) > 1 else (groups[0], "seeds")
    )
    deviation = stdev(values) if len(values) > 1 else None
    return Spread(fmean(values), deviation, over, len(values))


def in_domain(result: Result) -> float | None:
    """Accuracy on what was trained on."""
    if not result.source_kind:
        return None
    return accuracy(result.by(result.source_kind), result.source)


def transfer(result: Result) -> float | None:
    """Mean accuracy over the targets that were not trained on."""
    if not result.source_kind:
        return None
    numbers = result.by(result.source_kind)
    return mean(n.accuracy for name, n in numbers.items() if name != result.source)


def macro(result: Result, kind: Kind) -> float | None:
    """Mean accuracy over all targets, each counting the same however many questions it has."""
    return mean(numbers.accuracy for numbers in result.by(kind).values())


def _sorted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda name: (name.casefold(), name)))
