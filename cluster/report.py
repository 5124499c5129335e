"""What a command prints when it is done, and the JSON it writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from medrl.cluster.display import comparison
from medrl.cluster.journal import read_lines


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
    table = Table(title=f"{evaluation['split']}, greedy")
    for heading in ("", "n", "accuracy"):
        table.add_column(heading, justify="left" if not heading else "right")
    for kind in ("modality", "question_type"):
        for name, accuracy in evaluation[f"by_{kind}"].items():
            table.add_row(name, str(evaluation[f"n_by_{kind}"][name]), f"{accuracy:.3f}")
        table.add_section()
    table.add_row("all", str(evaluation["n"]), f"{evaluation['accuracy']:.3f}", style="bold")
    table.add_row("format", str(evaluation["n"]), f"{evaluation['format']:.3f}")
    console.print(table)


def show_scores(summary: Mapping[str, Any], console: Console) -> None:
    means = ", ".join(f"{name} {mean:.3f}" for name, mean in summary["scores"].items())
    outcomes = ", ".join(f"{name} {count}" for name, count in summary["outcomes"].items())
    console.print(f"{summary['n']} completions: {means} ({outcomes})", highlight=False)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)
