"""What is written of results: results.csv, tables.md, plots/*.png and report.html.

An experiment calls `write_report` after each run, so it takes a second or two for 24 of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medrl.configs.errors import UserError
from medrl.reports.comparison_plots import curve_groups, draw_bars, draw_curves
from medrl.reports.heatmaps import draw_heatmap
from medrl.reports.html_report import Picture, render_report
from medrl.reports.markdown import markdown
from medrl.reports.matrices import targets_of
from medrl.reports.results import PlannedRun, Result, read_plan, read_results
from medrl.reports.samples import choose_samples
from medrl.reports.tables import (
    WORDS,
    matrix_tables,
    named_matrices,
    of_kind,
    results_csv,
    shown_kinds,
    summary_tables,
)


def write_report(source: Path | Sequence[Result], out: Path | None = None, title: str = "") -> Path:
    """Write everything there is to say of an experiment's folder, or of results, into `out` (of a
    folder: itself); returns report.html. Raises `UserError` where no run is finished."""
    results = read_results(source) if isinstance(source, Path) else tuple(source)
    plan = read_plan(source, results) if isinstance(source, Path) else ()
    if not results:
        raise UserError(f"{source}: no run is finished yet, so there is nothing to report")
    if out is None:
        if not isinstance(source, Path):
            raise ValueError("results by themselves have no folder: name `out`")
        out = source
    title = title or out.resolve().name
    plots = out / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    summary, matrices = summary_tables(results, plan), matrix_tables(results, plan)
    _write(out / "results.csv", results_csv(results))
    _write(out / "tables.md", markdown([*summary, *matrices]))
    pictures = _draw(results, plan, plots)
    page = render_report(
        title,
        results,
        plan,
        summary=summary,
        matrices=matrices,
        pictures=pictures,
        samples=choose_samples(results),
    )
    _write(out / "report.html", page)
    return out / "report.html"


def _draw(results: Sequence[Result], plan: Sequence[PlannedRun], plots: Path) -> list[Picture]:
    pictures = []
    for kind in shown_kinds(results):
        runs = of_kind(results, kind)
        if targets_of(runs, kind):
            pictures.append(
                Picture(
                    title=f"Accuracy by {WORDS[kind]}",
                    path=draw_bars(runs, kind, plots),
                    note="Mean over sources and seeds. Whiskers: the 95 % interval of one "
                    "evaluation, what its number of questions leaves open. Dashed: chance.",
                    wide=True,
                )
            )
    pictures += [
        Picture(title=shown.title, path=draw_heatmap(shown, plots))
        for shown in named_matrices(results, plan)
    ]
    for title, runs in curve_groups(results, plan).items():
        if path := draw_curves(runs, title, plots):
            pictures.append(Picture(title=f"{title}: training", path=path, wide=True))
    return pictures


def _write(path: Path, text: str) -> None:
    """Whole or not at all: someone may be reading the last one."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8", errors="replace")  # half a surrogate pair is a "?"
    aside.replace(path)
