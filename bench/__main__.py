"""`python -m medrl.bench NAME ...`: measure, print, record. `page` and `check` use the records."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table as Grid

from medrl.bench import records, tables
from medrl.bench.check import check_all
from medrl.bench.facts import Refused
from medrl.bench.frame import LEAST_PAIRS, Benchmark, Case, Options
from medrl.bench.page import PAGE, make_page
from medrl.reports.markdown import Table

NAMES = (
    "step",
    "learner_rows",
    "frozen_tower",
    "rollout",
    "loop",
    "overlap",
    "images",
    "sync",
    "startup",
)
"""The files of this package that hold a BENCHMARK, in the page's order."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: done; 1: refused, or a ratio was lost."""
    parser = argparse.ArgumentParser(prog="python -m medrl.bench", description=__doc__)
    choices = ("page", "check", *NAMES)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(choices)}")
    parser.add_argument("--short", action="store_true", help="the short form; nothing is recorded")
    parser.add_argument("--pairs", type=int, default=LEAST_PAIRS, help="runs of each side")
    parser.add_argument("--folder", type=Path, default=Options().folder, help="of models, images")
    chosen = parser.parse_args(arguments)
    if unknown := [name for name in chosen.names if name not in choices]:
        parser.error(f"unknown: {', '.join(unknown)}; there is {', '.join(choices)}")
    options = Options(short=chosen.short, pairs=chosen.pairs, folder=chosen.folder)
    if "page" in chosen.names:
        PAGE.write_text(make_page(map(load, NAMES)), encoding="utf-8")
        return 0
    try:
        if "check" in chosen.names:
            return _check(options)
        for name in chosen.names or NAMES:
            _measure(load(name), options)
    except Refused as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 1
    return 0


def load(name: str) -> Benchmark:
    """The benchmark of a file; only here is what it needs imported."""
    found: Benchmark = importlib.import_module(f"medrl.bench.{name}").BENCHMARK
    return found


def _measure(benchmark: Benchmark, options: Options) -> None:
    record = records.make_record(benchmark, benchmark.run(options, _tell))
    _show(tables.measured(benchmark, record))
    if options.short:
        return
    if found := tables.targets(benchmark, record):
        _show(found)
    print(f"recorded in {records.append(record)}")


def _tell(case: Case) -> None:
    ratios = ", ".join(f"{ratio:.3g}" for ratio in case.ratios)
    print(f"{case.name}: ratios {ratios}", flush=True)


def _check(options: Options) -> int:
    found, whole = check_all(
        [benchmark for benchmark in map(load, NAMES) if benchmark.checked],
        replace(options, short=True),
    )
    _show(found)
    return 0 if whole else 1


def _show(table: Table) -> None:
    grid = Grid(title=table.title, title_justify="left")
    for number, heading in enumerate(table.headings):
        grid.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in table.rows:
        grid.add_row(*row)
    Console().print(grid)


if __name__ == "__main__":
    sys.exit(main())
