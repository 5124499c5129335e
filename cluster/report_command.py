"""`medrl report`: tables and pictures of runs that are there already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medrl.cluster.console import make_console
from medrl.configs.errors import UserError

if TYPE_CHECKING:
    from medrl.reports import markdown
    from medrl.reports.results import Result

SHOWN = ("method", "runs", "± over", "in-domain", "transfer", "lenient", "all", "95 %", "format")
"""Columns of the methods' table that a terminal has room for."""


def register(app: typer.Typer) -> None:
    """Add the command to `medrl`."""
    app.command()(report)


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Folders of experiments, and run directories that have an evaluation.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the report; else the experiment's own, or RUN/report of one run."
        ),
    ] = None,
) -> int:
    """Compare finished runs: report.html, tables.md, results.csv and plots.

    report.html is one file that needs nothing beside it.
    """
    from medrl.reports.report_files import write_report
    from medrl.reports.results import is_experiment, read_results

    results = read_results(*paths)
    # An experiment by itself also has a plan, and so says what is missing.
    whole = len(paths) == 1 and is_experiment(paths[0])
    where = _folder(paths, out, whole=whole)
    try:
        write_report(paths[0] if whole else results, where)
    except OSError as error:
        raise UserError(f"--out: {where} cannot be written: {error.strerror}") from None
    console = make_console()
    show_methods(results, console)
    for name in ("report.html", "tables.md", "results.csv", "plots"):
        console.print(f"{where / name}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _folder(paths: Sequence[Path], out: Path | None, *, whole: bool) -> Path:
    if out is not None:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out: {out} is a file, needs a folder")
        return out
    if len(set(paths)) > 1:
        raise UserError("--out: name a folder; several paths have none in common")
    return paths[0] if whole else paths[0] / "report"


def show_methods(results: Sequence[Result], console: Console) -> None:
    """Print the comparison of methods, once for each kind of source."""
    from medrl.reports.tables import methods_tables

    for table in methods_tables(results):
        console.print(_for_console(table))


def _for_console(table: markdown.Table) -> Table:
    from medrl.reports.samples import cleaned

    # `Text`, for names may look like rich's markup; `cleaned`, for they may hold escape sequences.
    shown = Table(title=Text(table.title), box=box.SIMPLE_HEAD, pad_edge=False)
    places = [place for place, heading in enumerate(table.headings) if heading in SHOWN]
    for place in places:
        shown.add_column(table.headings[place], justify="right" if place else "left")
    for row in table.rows:
        shown.add_row(*(Text(cleaned(row[place])) for place in places))
    return shown
