"""What a command prints when it is done, and the JSON it writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medrl.cluster.display import comparison
from medrl.reports.lines import read_lines


def show_result(run_dir: Path, console: Console, *, finished: bool) -> None:
    """The table of the first and last evaluation, and where everything lies."""
    evals = read_lines(run_dir / "evals.jsonl")
    if finished and len(evals) > 1:
        console.print(comparison(evals[0], evals[-1]))
    if not finished:
        console.print("stopped; a checkpoint was written, go on with --resume")
    rows = [("run directory", run_dir), ("plots", run_dir / "plots")]
    if finished:
        rows.append(("exported model", run_dir / "export"))
    for label, path in rows:
        console.print(f"{label:15} {path}", highlight=False, soft_wrap=True)


def show_evaluation(evaluation: Mapping[str, Any], console: Console) -> None:
    """The table of `breakdown.summarize`'s numbers, what the blind probe found, and any notes."""
    console.print(_evaluation_table(evaluation))
    owed = evaluation["blind_difference"]
    if owed:
        console.print(
            f"seeing less blind: {owed['difference']:+.3f} (95 % {owed['low']:+.3f} to "
            f"{owed['high']:+.3f}, n {owed['n']})",
            highlight=False,
        )
    for note in evaluation.get("notes", ()):
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def _evaluation_table(evaluation: Mapping[str, Any]) -> Table:
    overall, *rows = evaluation["breakdown"]
    title = f"accuracy, {evaluation['split']}, greedy"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, show_edge=False)  # 80 columns do
    headings = ["n", "strict", "95 %", "lenient", "chance", "format", "tokens"]
    probed = overall["blind"] is not None
    table.add_column("", overflow="fold")
    for heading in [*headings, "blind"] if probed else headings:
        table.add_column(heading, justify="right", no_wrap=True)

    def add(row: Mapping[str, Any], style: str = "") -> None:
        table.add_row(Text(row["name"]), *_cells(row)[: 8 if probed else 7], style=style)

    for kind in ("modality", "question_type"):
        for row in rows:
            if row["kind"] == kind:
                add(row)
        table.add_section()
    add(overall, "bold")
    for kind, kinds in (("modality", "modalities"), ("question_type", "question types")):
        table.add_row(f"mean of {kinds}", "", f"{evaluation[f'macro_by_{kind}']:.3f}")
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    return [
        str(row["n"]),
        share(row["accuracy"]),
        f"{row['low']:.2f}-{row['high']:.2f}",
        share(row["lenient"]),
        share(row["chance"]),
        share(row["format"]),
        f"{row['tokens_per_completion']:.1f}",
        share(row["blind"]),
    ]


def show_scores(summary: Mapping[str, Any], console: Console) -> None:
    means = ", ".join(f"{name} {mean:.3f}" for name, mean in summary["scores"].items())
    outcomes = ", ".join(f"{name} {count}" for name, count in summary["outcomes"].items())
    console.print(f"{summary['n']} completions: {means} ({outcomes})", highlight=False)
    if "differing" in summary:
        compared = summary["n"] - summary["failed"]
        told = f"{summary['differing']} of {compared} scores differ from those recorded"
        if summary["failed"]:
            told += f"; {summary['failed']} failed then or now"
        example = f"; {summary['example']}" if summary["example"] else ""
        console.print(told + example, highlight=False, soft_wrap=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)
