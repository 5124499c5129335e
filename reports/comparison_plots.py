"""Methods side by side: bars of held-out accuracy, and the training curves of all their runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from medrl.reports.heatmaps import file_name, save, shorten
from medrl.reports.lines import read_lines
from medrl.reports.matrices import mean, targets_of
from medrl.reports.results import Kind, Numbers, PlannedRun, Result, methods_of
from medrl.reports.tables import WORDS, method_mean

SMOOTHED_OVER = 9  # steps
MOST_LEGEND_LINES = 20  # runs named beside the curves; more would leave no room for the curves

CURVES = {  # key of metrics.jsonl -> title; where the first is there it is a GRPO run
    "reward.mean": "reward, mean of a step",
    "reward.accuracy": "accuracy of the trained completions",
    "tokens.per_completion": "tokens a completion",
}
SFT_CURVES = {"loss": "loss, nats a target token", "gradient_norm": "gradient norm"}


def draw_bars(results: Sequence[Result], kind: Kind, folder: Path) -> Path:
    """Accuracy of each method on each target and over all questions; the chance level dashed.

    The bar is the mean over sources and seeds. The whisker is the 95 % interval of one evaluation,
    the mean of the runs' limits: what the number of questions leaves open, not the runs' spread.
    """
    methods, targets = methods_of(results), targets_of(results, kind)
    groups: list[tuple[Kind, str]] = [("all", "all"), *((kind, name) for name in targets)]
    width = 0.84 / len(methods)
    across = 2.5 + len(groups) * max(0.9, 0.26 * len(methods))
    figure, axes = plt.subplots(figsize=(min(across, 24), 4.8), layout="constrained")
    for number, method in enumerate(methods):
        at = [place + (number - (len(methods) - 1) / 2) * width for place in range(len(groups))]
        heights = [method_mean(results, method, *group) for group in groups]
        axes.bar(
            at,
            [math.nan if height is None else 100 * height for height in heights],
            width,
            yerr=_whiskers(results, method, groups, heights),
            error_kw={"lw": 0.9, "capsize": 2, "ecolor": "0.25"},
            color=plt.get_cmap("tab10" if len(methods) <= 10 else "tab20")(number),
            label=shorten(method, 40),
        )
    for place, group in enumerate(groups):
        if (chance := mean(numbers.chance for numbers in _of(results, group))) is not None:
            ends = (place - 0.46, place + 0.46)
            axes.hlines(100 * chance, *ends, color="black", ls="--", lw=1.2, zorder=3)
    axes.plot([], [], "k--", lw=1.2, label="chance")
    axes.axvline(0.5, color="0.7", lw=0.8)
    names = ["all questions", *map(shorten, targets)]
    axes.set_xticks(range(len(groups)), names, rotation=30, ha="right")
    axes.set(
        xlim=(-0.5, len(groups) - 0.5),
        ylim=(0, 103),
        ylabel="held-out accuracy, per cent",
        xlabel=f"tested on ({WORDS[kind]})",
    )
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)
    _legend(figure, axes, len(methods) + 1)
    return save(figure, folder / f"methods_by_{kind}.png")


def curve_groups(
    results: Sequence[Result], plan: Sequence[PlannedRun] = ()
) -> dict[str, list[Result]]:
    """Runs to draw together, by title: those of a method; where each method has or will have one
    run, those of all GRPO methods and those of all SFT methods, to be compared."""
    trained = [result for result in results if result.train != "none"]
    cells = {(run.method, run.source, run.seed) for run in trained}
    cells |= {(run.method, run.source, run.seed) for run in plan}
    alone = len(cells) == len({method for method, _, _ in cells})
    groups: dict[str, list[Result]] = {}
    for run in sorted(trained, key=lambda r: (r.order, r.source.casefold(), r.seed)):
        groups.setdefault(run.train.upper() if alone else run.method, []).append(run)
    return groups


def draw_curves(runs: Sequence[Result], title: str, folder: Path) -> Path | None:
    """Training curves of runs that `curve_groups` puts together: a colour a source, or a method
    where there are several; a line style a seed. None: there are no steps."""
    journals = [(run, read_lines(run.folder / "metrics.jsonl")) for run in runs]
    journals = [(run, steps) for run, steps in journals if steps]
    curves = CURVES if any("reward.mean" in steps[0] for _, steps in journals) else SFT_CURVES
    shown = [key for key in curves if any(key in steps[0] for _, steps in journals)]
    if not shown:
        return None
    figure, panels = plt.subplots(
        1, len(shown), figsize=(4.4 * len(shown) + 2.2, 4), layout="constrained", squeeze=False
    )
    for axes, key in zip(panels[0], shown, strict=True):
        _draw_curve(axes, key, journals)
        axes.set_title(curves[key], fontsize=10)
    about = f"training, mean over {SMOOTHED_OVER} steps"
    figure.suptitle(f"{shorten(title, 80)}: {about}", fontsize=11)
    if len(journals) <= MOST_LEGEND_LINES:
        panels[0][-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)
    return save(figure, folder / f"{file_name(f'{title} training')}.png")


def _draw_curve(axes: Axes, key: str, journals: Sequence[tuple[Result, list[Any]]]) -> None:
    several = len({run.method for run, _ in journals}) > 1
    names = [run.method if several else run.source or "all data" for run, _ in journals]
    kinds = list(dict.fromkeys(names))
    colours = plt.get_cmap("tab10" if len(kinds) <= 10 else "tab20")
    least = 0.0
    for name, (run, steps) in zip(names, journals, strict=True):
        known = [step for step in steps if key in step]
        values = _smoothed([step[key] for step in known])
        least = min([least, *values])
        axes.plot(
            [step["step"] for step in known],
            values,
            color=colours(kinds.index(name) % colours.N),
            ls=("-", "--", ":", "-.")[run.seed % 4],
            lw=1.4,
            label=f"{shorten(name)}, seed {run.seed}",
        )
    if least == 0:
        axes.set_ylim(0, None)  # a reward may lie below
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)


def _of(results: Iterable[Result], group: tuple[Kind, str]) -> list[Numbers]:
    return [result.targets[group] for result in results if group in result.targets]


def _whiskers(
    results: Sequence[Result],
    method: str,
    groups: Sequence[tuple[Kind, str]],
    heights: Sequence[float | None],
) -> list[list[float]]:
    """Lengths down and up from each bar's end, in percentage points; nan: no interval known."""
    ends: list[list[float]] = [[], []]
    for group, height in zip(groups, heights, strict=True):
        low, high = (method_mean(results, method, *group, end) for end in ("low", "high"))
        known = height is not None and low is not None and high is not None
        # At 0 or 1 rounding may put the bar's end past the limit by an ulp.
        ends[0].append(100 * max(0.0, (height or 0.0) - (low or 0.0)) if known else math.nan)
        ends[1].append(100 * max(0.0, (high or 0.0) - (height or 0.0)) if known else math.nan)
    return ends


def _smoothed(values: Sequence[float]) -> list[float]:
    half = SMOOTHED_OVER // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _legend(figure: Any, axes: Axes, lines: int) -> None:
    """Above the bars, where none is hidden."""
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=min(lines, 5),
        frameon=False,
        fontsize=9,
    )
