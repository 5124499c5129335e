"""Results as tables, for tables.md and the HTML report alike, and as results.csv.

Shares are in [0, 1] in the CSV and in per cent elsewhere. What was not measured, or is not there
yet, is an empty cell in the CSV and "–" elsewhere.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

from medrl.reports import matrices
from medrl.reports.markdown import MINUS, MISSING, Table, number, percent, points
from medrl.reports.matrices import Matrix, Spread, difference, matrix, mean, spread
from medrl.reports.results import KINDS, Kind, Numbers, PlannedRun, Result, methods_of

Measure = Callable[[Result], float | None]

WORDS = {"modality": "modality", "question_type": "question type"}


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedMatrix:
    """A matrix as it is shown."""

    title: str
    matrix: Matrix
    is_difference: bool


CSV_COLUMNS = (
    *("method", "train", "mode", "source", "seed", "target_kind", "target", "n", "correct"),
    *("accuracy", "low", "high", "lenient", "format", "chance", "blind"),
    *("tokens_per_completion", "steps", "seconds"),
)


def results_csv(results: Sequence[Result]) -> str:
    """A line for each result and target; the header is `CSV_COLUMNS`."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for result in sorted(results, key=lambda r: (r.order, r.source_kind, r.source, r.seed)):
        for (kind, target), numbers in result.targets.items():
            about = {"target_kind": kind, "target": target}
            for name in CSV_COLUMNS:
                if name not in about:
                    owner = numbers if name in Numbers.__slots__ else result
                    about[name] = getattr(owner, name)
            writer.writerow(about)
    return out.getvalue()


def shown_kinds(results: Sequence[Result]) -> tuple[Kind, ...]:
    """What the runs were trained on one of; both kinds where all were trained on everything."""
    kinds = {result.source_kind for result in results}
    return tuple(kind for kind in KINDS if kind in kinds) or KINDS


def of_kind(results: Sequence[Result], kind: Kind) -> list[Result]:
    """The runs that belong in tables of a kind: trained on one of it, on all data or not at all."""
    return [result for result in results if result.source_kind in ("", kind)]


def named_matrices(results: Sequence[Result], plan: Sequence[PlannedRun] = ()) -> list[NamedMatrix]:
    """Every method's matrix, then every difference of two methods, where two sources or more were
    or will be trained on: the later method less the earlier, in the order they are shown."""
    shown: list[NamedMatrix] = []
    for kind in shown_kinds(results):
        runs = of_kind(results, kind)
        if len(matrices.sources_of(runs, kind, plan)) < 2:
            continue
        trained = methods_of([run for run in runs if run.train != "none"])
        each = {method: matrix(runs, method, kind, plan) for method in trained}
        by = f"by {WORDS[kind]}"
        shown += [
            NamedMatrix(title=f"{method}: accuracy {by}", matrix=m, is_difference=False)
            for method, m in each.items()
        ]
        shown += [
            NamedMatrix(
                title=f"{later} {MINUS} {earlier} {by}",
                matrix=difference(each[later], each[earlier]),
                is_difference=True,
            )
            for earlier, later in combinations(trained, 2)
        ]
    return shown


def methods_tables(results: Sequence[Result], plan: Sequence[PlannedRun] = ()) -> list[Table]:
    """One for each kind of source, or a single one where no run was trained on one source."""
    if not any(result.source_kind for result in results):
        return [methods_table(results, None, plan)]
    kinds = shown_kinds(results)
    return [methods_table(of_kind(results, kind), kind, plan) for kind in kinds]


def summary_tables(results: Sequence[Result], plan: Sequence[PlannedRun] = ()) -> list[Table]:
    """Methods, then targets, then what the model did before any training."""
    tables = methods_tables(results, plan)
    for kind in shown_kinds(results):
        if matrices.targets_of(of_kind(results, kind), kind):
            tables.append(by_target_table(of_kind(results, kind), kind))
    if any(result.train == "none" for result in results):
        tables.append(zero_shot_table(results))
    return tables


def matrix_tables(results: Sequence[Result], plan: Sequence[PlannedRun] = ()) -> list[Table]:
    """The heat maps' numbers."""
    return [matrix_table(shown) for shown in named_matrices(results, plan)]


def methods_table(
    results: Sequence[Result], kind: Kind | None, plan: Sequence[PlannedRun] = ()
) -> Table:
    """Compare methods: a row each, means over sources and seeds with their deviation. `kind` is
    that of the sources; None: no run was trained on one source."""
    by_source = () if kind is None else _by_source(kind)
    spread_out: tuple[tuple[str, Measure], ...] = (
        *by_source,
        ("lenient", lambda run: run.overall.lenient),
        ("all", lambda run: run.overall.accuracy),
    )
    plain = ("format", "blind", "chance")
    rows = []
    for method in methods_of(results):
        runs = [run for run in results if run.method == method]
        planned = sum(one.method == method for one in plan)
        count = f"{len(runs)}/{planned}" if planned > len(runs) else f"{len(runs)}"
        values = [spread(runs, measure) for _, measure in spread_out]
        shares = [mean(getattr(run.overall, name) for run in runs) for name in plain]
        tokens = mean(run.overall.tokens_per_completion for run in runs)
        seconds = sum(run.seconds for run in runs) / len(runs)
        last = (number(tokens), f"{seconds:.0f}", f"{max(run.overall.n for run in runs)}")
        ends = [mean(getattr(run.overall, end) for run in runs) for end in ("low", "high")]
        middle = (*map(_with_deviation, values), _interval(*ends), *map(percent, shares))
        rows.append((method, count, _over(values), *middle, *last))
    headings = [heading for heading, _ in spread_out]
    return Table(
        title="Methods" if kind is None else f"Methods, by {WORDS[kind]}",
        headings=("method", "runs", "± over", *headings, "95 %", *plain, "tokens", "s/run", "n"),
        rows=tuple(rows),
        note=_methods_note(kind),
    )


def _by_source(kind: Kind) -> tuple[tuple[str, Measure], ...]:
    return (
        ("in-domain", matrices.in_domain),
        ("transfer", matrices.transfer),
        ("mean", lambda run: matrices.macro(run, kind)),
    )


def _methods_note(kind: Kind | None) -> str:
    by_source = (
        f"In-domain: on the {WORDS[kind]} that was trained on; transfer: mean of the others; mean: "
        "of both, each target counting the same. "
        if kind
        else ""
    )
    return (
        f"Held-out accuracy in per cent, greedy, strict. {by_source}All: over all questions, "
        "with the 95 % interval of one evaluation, which is of n questions. Lenient reads an "
        "answer wherever it stands; blind is with the images blanked. ± is the standard deviation "
        "over the sources, or over the seeds of one source; s/run is the time of a run."
    )


def by_target_table(results: Sequence[Result], kind: Kind) -> Table:
    """Each method's accuracy on each target, mean over sources and seeds; best in bold."""
    targets = matrices.targets_of(results, kind)
    methods = methods_of(results)
    values = [
        [method_mean(results, method, kind, target) for target in targets] for method in methods
    ]
    bold = {
        (row, column + 1)
        for column in range(len(targets))
        for row in range(len(methods))
        if values[row][column] is not None
        and values[row][column] == max(v[column] or 0.0 for v in values)
    }
    guess = [
        mean(r.by(kind)[target].chance for r in results if target in r.by(kind))
        for target in targets
    ]
    shown = [
        (method, *(percent(value) for value in (*row, mean(row))))
        for method, row in zip(methods, values, strict=True)
    ]
    return Table(
        title=f"Accuracy on each {WORDS[kind]}",
        headings=("method", *targets, "mean"),
        rows=(*shown, ("chance", *(percent(value) for value in (*guess, mean(guess))))),
        note="Per cent, strict; mean over all sources and seeds. Best of a column in bold.",
        bold=frozenset(bold),
    )


def method_mean(
    results: Sequence[Result], method: str, kind: Kind, target: str, field: str = "accuracy"
) -> float | None:
    """Mean over sources of the means over seeds, of a field of `Numbers`."""

    def measure(run: Result) -> float | None:
        found = run.targets.get((kind, target))
        return getattr(found, field) if found else None

    found = spread([result for result in results if result.method == method], measure)
    return found.mean if found else None


def zero_shot_table(results: Sequence[Result]) -> Table:
    """The untrained model, strict and lenient side by side."""
    rows = []
    for result in sorted(results, key=lambda r: r.order):
        if result.train != "none":
            continue
        for (_, target), found in result.targets.items():
            interval = _interval(found.low, found.high)
            shares = (found.lenient, found.format, found.chance, found.blind)
            first = (result.method, target, f"{found.n}", percent(found.accuracy), interval)
            rows.append((*first, *map(percent, shares)))
    measured = ("strict", "95 %", "lenient", "format", "chance", "blind")
    return Table(
        title="Zero-shot",
        headings=("method", "tested on", "n", *measured),
        rows=tuple(rows),
        note=(
            "The model before any training. Strict wants the answer in the asked tags, lenient "
            "reads it wherever it stands: the difference is form, not knowledge."
        ),
    )


def matrix_table(shown: NamedMatrix) -> Table:
    """A matrix with its means; the diagonal in bold."""
    m = shown.matrix
    text = points if shown.is_difference else percent
    rows = [
        (source, *map(text, row), text(row_mean))
        for source, row, row_mean in zip(m.sources, m.cells, m.source_means, strict=True)
    ]
    means = ("mean", *map(text, m.target_means), text(m.mean))
    gaps = f" {m.missing} cells are missing and left out of the means." if m.missing else ""
    unit = "Percentage points" if shown.is_difference else "Per cent"
    return Table(
        title=shown.title,
        headings=("trained on \\ tested on", *m.targets, "mean"),
        rows=(*rows, means),
        note=(
            f"{unit}, mean over seeds. In-domain (the diagonal, bold): {text(m.in_domain)}; "
            f"transfer (all else): {text(m.transfer)}.{gaps}"
        ),
        bold=frozenset(
            (row, 1 + m.targets.index(source))
            for row, source in enumerate(m.sources)
            if source in m.targets
        ),
    )


def _interval(low: float | None, high: float | None) -> str:
    return MISSING if low is None or high is None else f"{percent(low)} to {percent(high)}"


def _with_deviation(value: Spread | None) -> str:
    if value is None:
        return MISSING
    shown = percent(value.mean)
    return shown if value.deviation is None else f"{shown} ± {percent(value.deviation)}"


def _over(values: Sequence[Spread | None]) -> str:
    """What the deviations are over: the same for all columns that have one."""
    spreads = [value for value in values if value is not None and value.deviation is not None]
    return f"{spreads[0].count} {spreads[0].over}" if spreads else MISSING
