"""A table as text, and its Markdown. Names in it come from data sets and are not trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MISSING = "–"
MINUS = "−"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Text in rows and columns; the first column names the rows."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    bold: frozenset[tuple[int, int]] = frozenset()  # (row, column) of cells that stand out

    def __post_init__(self) -> None:
        if wrong := [row for row in self.rows if len(row) != len(self.headings)]:
            raise ValueError(f"{self.title}: {len(self.headings)} headings, row {wrong[0]}")


def percent(share: float | None) -> str:
    return number(None if share is None else 100 * share)


def number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def points(share: float | None) -> str:
    """A difference in percentage points, with its sign."""
    if share is None:
        return MISSING
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", MINUS)


def markdown(tables: Sequence[Table]) -> str:
    """Headings start at ##, for the text to be part of a page."""
    return "\n".join(_markdown(table) for table in tables)


def _markdown(table: Table) -> str:
    lines = [f"## {_escaped(table.title)}", "", *table_lines(table)]
    return "\n".join([*lines, "", *([_escaped(table.note), ""] if table.note else [])])


def table_lines(table: Table) -> list[str]:
    """Headings and rows, without title and note."""
    lines = [_line([_escaped(heading) for heading in table.headings])]
    lines += [_line(["---", *["---:"] * (len(table.headings) - 1)])]
    for number, row in enumerate(table.rows):
        cells = [_escaped(cell) for cell in row]
        lines += [
            _line([f"**{c}**" if (number, i) in table.bold else c for i, c in enumerate(cells)])
        ]
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Names come from data sets: none may end a cell, open a tag or a link."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join("\\" + mark if mark in "\\|`*_[]" else mark for mark in flat)
