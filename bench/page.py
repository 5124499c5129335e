"""docs/benchmarks.md, made from the last record of each benchmark. Nothing on it is typed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medrl.bench import records, tables
from medrl.bench.frame import Benchmark
from medrl.reports.markdown import table_lines

PAGE = records.ROOT / "docs" / "benchmarks.md"
HEAD = """\
# Benchmarks

Made by `python -m medrl.bench page` from bench/results; each number by the command above it, or all
by `make bench`. The two sides of a line did the same work in one run, in pairs whose order
alternates; shown are medians, and the least and the most ratio of a pair. The ratio is the other's
cost over ours: above 1 ours is cheaper. Compare ratios: seconds are a machine's. A run whose
gradients are zero, whose completions are shorter than asked or whose sync moved nothing is refused.
"""


def make_page(benchmarks: Iterable[Benchmark], folder: Path | None = None) -> str:
    """The whole page; benchmarks without a record are left out."""
    sections = [
        _section(benchmark, record)
        for benchmark in benchmarks
        for record in records.last_of_each_accelerator(benchmark.name, folder).values()
    ]
    return "\n".join([HEAD, *sections])


def _section(benchmark: Benchmark, record: dict[str, Any]) -> str:
    machine = record["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    accelerator = "" if machine["accelerator"] == "none" else f" and {machine['accelerator']}"
    parts = [
        f"## {benchmark.title}",
        "",
        benchmark.text,
        "",
        f"`python -m medrl.bench {benchmark.name}`",
        "",
        *table_lines(tables.measured(benchmark, record)),
    ]
    if found := tables.targets(benchmark, record):
        parts += ["", *table_lines(found)]
    parts += ["", *_settings(record["cases"])]
    parts += [
        f"{record['date'][:10]}, revision {record['revision']}; {machine['cpu']}{accelerator}, "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB, load {machine['load']} before; "
        f"{versions}.",
        "",
    ]
    return "\n".join(parts)


def _settings(cases: Sequence[dict[str, Any]]) -> list[str]:
    """What all cases share once, the others case by case."""
    first = cases[0]["settings"]
    shared = {
        key: value
        for key, value in first.items()
        if all(key in case["settings"] and case["settings"][key] == value for case in cases)
    }
    lines = [f"Settings: {_told(shared)}.", ""] if shared else []
    for case in cases:
        own = {key: value for key, value in case["settings"].items() if key not in shared}
        lines += [f"- {case['name']}: {_told(own)}"] if own else []
    return [*lines, ""] if lines and lines[-1] else lines


def _told(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
    )
