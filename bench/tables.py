"""A record as tables: what was measured, and which targets it meets."""

from __future__ import annotations

from statistics import median
from typing import Any

from medrl.bench.frame import RATIO, Benchmark
from medrl.reports.markdown import Table


def measured(benchmark: Benchmark, record: dict[str, Any]) -> Table:
    """A line a case: medians of both sides, the ratio with its spread, the numbers beside it."""
    rows = []
    for case in record["cases"]:
        ratio = case["ratio"]
        beside = ", ".join(f"{name} {_short(value)}" for name, value in case["numbers"].items())
        rows.append(
            (
                case["name"],
                case["unit"],
                _short(median(case["ours"])),
                _short(median(case["other"])),
                f"{_short(ratio['median'])} ({_short(ratio['least'])} to {_short(ratio['most'])})",
                beside,
            )
        )
    headings = ("", "unit", benchmark.ours, benchmark.other, "ratio", "besides")
    return Table(title=benchmark.title, headings=headings, rows=tuple(rows))


def targets(benchmark: Benchmark, record: dict[str, Any]) -> Table | None:
    """A line a target; None: it has none."""
    cases = {case["name"]: case for case in record["cases"]}
    rows = []
    for target in benchmark.targets:
        found = cases.get(target.case, {})
        value = found["ratio"]["median"] if found and target.number == RATIO else None
        if found and target.number != RATIO:
            value = found["numbers"].get(target.number)
        verdict = "not measured" if value is None else "met" if target.met(value) else "not met"
        shown = "" if value is None else _short(value)
        rows.append((target.case, target.number, target.wanted, shown, verdict))
    headings = ("", "number", "target", "measured", "")
    return Table(title="Targets", headings=headings, rows=tuple(rows)) if rows else None


def _short(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
