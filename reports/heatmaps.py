"""Heat maps of matrices: trained on (down) x tested on (across), with means at the margins."""

from __future__ import annotations

import hashlib
import re
import textwrap
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from medrl.reports.markdown import MINUS, MISSING, percent, points
from medrl.reports.matrices import Matrix
from medrl.reports.tables import WORDS, NamedMatrix

LONGEST_LABEL = 28  # characters of a source's or target's name
LONGEST_TITLE = 90
LONGEST_FILE_NAME = 80
LEAST_SPAN = 0.05  # of a difference's colours, so that noise looks pale


def draw_heatmap(shown: NamedMatrix, folder: Path) -> Path:
    """Write one heat map; returns the file, named after its title."""
    m = shown.matrix
    rows, columns = len(m.sources), len(m.targets)
    figure, axes = plt.subplots(
        figsize=(2.9 + 0.72 * (columns + 1), 2.3 + 0.46 * (rows + 1)), layout="constrained"
    )
    norm = _norm(m, is_difference=shown.is_difference)
    colours = plt.get_cmap("RdBu" if shown.is_difference else "viridis")
    text = points if shown.is_difference else percent

    def cell(x: int, y: int, value: float | None, *, margin: bool) -> None:
        if value is None:
            axes.add_patch(Rectangle((x, y), 1, 1, fc="white", ec="0.8", hatch="///", lw=0.5))
            axes.text(x + 0.5, y + 0.5, MISSING, ha="center", va="center", color="0.4")
            return
        colour = colours(norm(value))
        face = "0.95" if margin else colour
        axes.add_patch(Rectangle((x, y), 1, 1, fc=face, ec="white", lw=1))
        bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
        ink = "black" if margin or bright > 0.5 else "white"
        axes.text(x + 0.5, y + 0.5, text(value), ha="center", va="center", color=ink, size=9)

    for y, row in enumerate((*m.cells, m.target_means)):
        for x, value in enumerate((*row, m.source_means[y] if y < rows else m.mean)):
            cell(x, y, value, margin=x == columns or y == rows)
    for y, source in enumerate(m.sources):
        if source in m.targets:
            x = m.targets.index(source)
            axes.add_patch(Rectangle((x, y), 1, 1, fc="none", ec="black", lw=1.8, zorder=3))
    _label(axes, shown)
    return save(figure, folder / f"{file_name(shown.title)}.png")


def save(figure: Figure, path: Path) -> Path:
    """Write a figure and forget it."""
    with warnings.catch_warnings():
        # A letter the font lacks is drawn as a box; the page beside it has it as text.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _norm(m: Matrix, *, is_difference: bool) -> Normalize:
    if not is_difference:
        return Normalize(0.0, 1.0)
    span = max([LEAST_SPAN, *(abs(cell) for row in m.cells for cell in row if cell is not None)])
    return Normalize(-span, span)


def _label(axes: Axes, shown: NamedMatrix) -> None:
    m = shown.matrix
    rows, columns = len(m.sources), len(m.targets)
    axes.set(xlim=(0, columns + 1), ylim=(rows + 1, 0))
    names = [shorten(name) for name in (*m.targets, "mean")]
    axes.set_xticks([x + 0.5 for x in range(columns + 1)], names, rotation=35, ha="right")
    names = [shorten(name) for name in (*m.sources, "mean")]
    axes.set_yticks([y + 0.5 for y in range(rows + 1)], names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.axhline(rows, color="black", lw=0.8)
    axes.axvline(columns, color="black", lw=0.8)
    axes.set(xlabel=f"tested on ({WORDS[m.kind]})", ylabel="trained on")
    text = points if shown.is_difference else percent
    unit = "percentage points" if shown.is_difference else "per cent"
    title = textwrap.fill(shorten(shown.title, LONGEST_TITLE), width=16 + 8 * columns)
    means = f"in-domain {text(m.in_domain)}, transfer {text(m.transfer)}"
    axes.set_title(f"{title}\n{unit}; {means}", fontsize=10, loc="left")


def shorten(name: str, longest: int = LONGEST_LABEL) -> str:
    """A name as matplotlib may draw it: on one line, not too long, `$` not the start of maths."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return (flat if len(flat) <= longest else flat[: longest - 1] + "…").replace("$", r"\$")


def file_name(title: str) -> str:
    """A name for a file: the same for the same title, another for another."""
    words = title.replace(": ", " ").replace(f" {MINUS} ", " minus ")
    plain = re.sub(r"[^A-Za-z0-9-]+", "_", words).strip("_")[:LONGEST_FILE_NAME]
    if re.fullmatch(r"[A-Za-z0-9 -]+", words) and len(words) <= LONGEST_FILE_NAME:
        return plain
    return f"{plain}_{hashlib.sha256(title.encode()).hexdigest()[:8]}"
