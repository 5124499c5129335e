"""report.html: one file with tables, pictures and samples, that needs nothing beside it.

Completions and names are hostile text: the template escapes all of it, and there is no script.
"""

from __future__ import annotations

import base64
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from medrl.configs.experiment import flat
from medrl.reports.markdown import MISSING, Table, percent
from medrl.reports.results import PlannedRun, Result, methods_of
from medrl.reports.samples import Sample, printable

OF_A_RUN = ("run.name", "run.dir", "run.seed")  # differ between all runs, and are shown elsewhere
LONGEST_VALUE = 120  # characters of a config value


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A PNG that carries its title."""

    title: str  # for those who cannot see it
    path: Path
    note: str = ""  # below it
    wide: bool = False  # takes the page's whole width

    @property
    def uri(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.path.read_bytes()).decode()}"


def render_report(
    title: str,
    results: Sequence[Result],
    plan: Sequence[PlannedRun],
    *,
    summary: Sequence[Table],
    matrices: Sequence[Table],
    pictures: Sequence[Picture],
    samples: Sequence[Sample],
) -> str:
    """The page. Raises nothing for odd text; `title` may be any."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        # Of text only: what a macro returns is markup already, and cleaned.
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shared, differing = config_tables(results)
    return environment.get_template("report.html.j2").render(
        title=title,
        said=_said(results, plan),
        summary=summary,
        matrices=matrices,
        pictures=pictures,
        samples=samples,
        runs=runs_table(results, plan),
        shared=shared,
        differing=differing,
        percent=percent,
    )


def _said(results: Sequence[Result], plan: Sequence[PlannedRun]) -> str:
    done, all_runs = len(results), max(len(plan), len(results))
    hours = sum(result.seconds for result in results) / 3600
    time = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
    runs = f"{done} of {all_runs} runs done" if done < all_runs else f"{done} runs"
    return f"{runs}, {len(methods_of(results))} methods, {time} of training"


def runs_table(results: Sequence[Result], plan: Sequence[PlannedRun]) -> Table:
    """Every run, those still missing last."""
    untrained = {result.method for result in results if result.train == "none"}

    def first(run: Result | PlannedRun) -> tuple[str, str, str, str]:
        source = "" if run.method in untrained else run.source or "all data"
        return run.label, run.method, source, f"{run.seed}"

    rows: list[tuple[str, ...]] = [
        (
            *first(result),
            *(f"{result.steps}", f"{result.seconds:.0f}", f"{result.overall.n}"),
            percent(result.overall.accuracy),
        )
        for result in sorted(results, key=lambda r: (r.order, r.source, r.seed))
    ]
    done = {result.label for result in results}
    rows += [(*first(run), *[MISSING] * 4) for run in plan if run.label not in done]
    return Table(
        title="Runs",
        headings=("run", "method", "trained on", "seed", "steps", "seconds", "n", "accuracy"),
        rows=tuple(rows),
        note="Accuracy over all held-out questions, per cent. Runs without numbers are not done.",
    )


def config_tables(results: Sequence[Result]) -> tuple[Table, Table]:
    """The config keys all runs share, and those that differ, a column a method."""
    configs = {result.label: _config(result.folder) for result in results}
    configs = {label: config for label, config in configs.items() if config}
    keys = sorted({key for config in configs.values() for key in config} - set(OF_A_RUN))
    values = {key: {_shown(config, key) for config in configs.values()} for key in keys}
    methods = methods_of(results)

    def of_method(method: str, key: str) -> str:
        found = {
            _shown(configs[r.label], key)
            for r in results
            if r.method == method and r.label in configs
        }
        return found.pop() if len(found) == 1 else "varies" if found else MISSING

    differing = [
        (key, *(of_method(method, key) for method in methods))
        for key in keys
        if len(values[key]) > 1
    ]
    shared = [(key, *values[key]) for key in keys if len(values[key]) == 1]
    return (
        Table(title="What all runs share", headings=("key", "value"), rows=tuple(shared)),
        Table(
            title="What differs",
            headings=("key", *methods),
            rows=tuple(differing),
            note="Config keys; “varies” differs between the runs of a method.",
        ),
    )


def _config(folder: Path) -> Mapping[str, Any]:
    """A run's config as flat keys; {} where there is none to be read."""
    try:
        return flat(tomllib.loads((folder / "config.toml").read_text(encoding="utf-8")))
    except (OSError, ValueError):  # bad TOML and bad UTF-8 are ValueErrors
        return {}


def _shown(config: Mapping[str, Any], key: str) -> str:
    text = str(config[key]) if key in config else MISSING
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"
