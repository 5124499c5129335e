"""Tables of questions with named columns: JSON lines here, Hugging Face data sets beside it.

`data.columns` says which column holds what: {"question": "Question", "option_A": "Choice A"}.
Options may be a list, an object by letter, either as a text, or one column an option.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medrl.actors.types import LETTERS
from medrl.configs.loader import did_you_mean
from medrl.data import names
from medrl.data.rows import Problems, Row, RowError, Source, read_json_lines, text_of

_OPTION_FIELDS = tuple(f"option_{letter}" for letter in LETTERS)
FIELDS = (
    "id",
    "question",
    "options",
    *_OPTION_FIELDS,
    "answer",
    "images",
    "image",
    "modality",
    "question_type",
    "source",
)
"""Our names; a column of the same name needs no entry in `data.columns`."""

_REQUIRED = ("question", "answer")
_OWN_LABEL = re.compile(r"\s*\(?([A-Z])\s*[).:]\s*")

SaveImage = Callable[[Any], str]
"""Turns an image cell that is not a path into a path below the image root; may raise `RowError`."""


def read_json_lines_table(path: Path, columns: Mapping[str, str], problems: Problems) -> Source:
    """Read a .jsonl file, or all of a folder."""
    files = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
    if not files:
        problems.add(path, "no .jsonl file here")
    rows: list[Row] = []
    for file in files:
        records = list(read_json_lines(file, problems))
        present = list(dict.fromkeys(key for _, record in records for key in record))
        table = Table(str(file), file.stem, columns, _no_embedded_image)
        if records and table.check(present, problems):
            rows += table.rows(records, problems)
    return Source(rows=tuple(rows), root=path.parent if path.is_file() else path)


def _no_embedded_image(cell: Any) -> str:
    raise RowError(f"an image must be a path, got {type(cell).__name__}")


@dataclass(frozen=True, slots=True)
class Table:
    """How the rows of one table are read."""

    where: str  # file or data set, for messages
    stem: str  # source and id prefix of rows that have none of their own
    columns: Mapping[str, str]  # our name -> theirs
    save_image: SaveImage

    def check(self, present: Collection[str], problems: Problems) -> bool:
        """Report fields we do not know and columns the table does not have; True: all is well."""
        before = len(problems.found)
        for field, column in self.columns.items():
            if field not in FIELDS:
                problems.add("data.columns", f"no field {field!r}; {did_you_mean(field, FIELDS)}")
            elif column not in present:
                hint = did_you_mean(column, present)
                problems.add(self.where, f"no column {column!r} (data.columns.{field}); {hint}")
        for field in _REQUIRED:
            if field not in self.columns and field not in present:
                hint = did_you_mean(field, present)
                problems.add(
                    self.where, f"no column {field!r}; {hint}: name yours in data.columns.{field}"
                )
        return len(problems.found) == before

    def rows(
        self, records: Iterable[tuple[str, Mapping[str, Any]]], problems: Problems
    ) -> list[Row]:
        """Read all records of (where, cells by column); a row that cannot be read is reported."""
        rows: list[Row] = []
        for number, (where, record) in enumerate(records, 1):
            cells = {field: record.get(self.columns.get(field, field)) for field in FIELDS}
            try:
                rows.append(self._row(cells, where, number))
            except RowError as error:
                problems.add(where, str(error))
        return rows

    def _row(self, cells: Mapping[str, Any], where: str, number: int) -> Row:
        gold = cells["answer"]
        is_index = isinstance(gold, int) and not isinstance(gold, bool)
        return Row(
            where=where,
            id=_text_or(cells["id"], f"{self.stem}/{number}", "id"),
            question=text_of(cells["question"], "question"),
            options=read_options(cells),
            gold=gold if is_index else text_of(gold, "answer"),
            gold_kind="either",
            images=self._images(cells),
            modality=_text_or(cells["modality"], names.UNKNOWN, "modality"),
            question_type=_text_or(cells["question_type"], names.UNKNOWN, "question_type"),
            source=_text_or(cells["source"], self.stem, "source"),
        )

    def _images(self, cells: Mapping[str, Any]) -> tuple[str, ...]:
        """Image paths of a row; none at all is a question about text alone."""
        found = cells["images"] if cells["images"] is not None else cells["image"]
        if found is None:
            return ()
        listed = found if isinstance(found, list) else [found]
        return tuple(cell if isinstance(cell, str) else self.save_image(cell) for cell in listed)


def _text_or(cell: Any, default: str, name: str) -> str:
    return default if cell is None else text_of(cell, name)


def read_options(cells: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a row's options without labels of their own ("A: CT"); () for an open question."""
    found = cells["options"]
    if isinstance(found, str):
        found = _parsed(found)
    if found is None:
        found = [cells[field] for field in _OPTION_FIELDS if cells[field] is not None]
    if isinstance(found, dict):
        found = _in_order(found)
    if not isinstance(found, list):
        raise RowError(f"options must be a list, got {type(found).__name__}")
    options = [text_of(option, "an option") for option in found]
    labels = [match and match.group(1) for match in map(_OWN_LABEL.match, options)]
    if len(options) > 1 and labels == [chr(ord("A") + i) for i in range(len(options))]:
        options = [_OWN_LABEL.sub("", option, count=1) for option in options]
    return tuple(options)


def _parsed(text: str) -> Any:
    """Options written as one text, as MMMU does: "['CT', 'MRI']"."""
    if not text.strip():
        return None
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise RowError(f"options must be a list, got the text {text[:60]!r}") from None


def _in_order(by_letter: Mapping[str, Any]) -> list[Any]:
    """Options by letter, in order. Absent ones are null in Arrow's structs; a gap is refused."""
    given = {key.strip().upper(): text for key, text in by_letter.items() if text is not None}
    letters = [chr(ord("A") + i) for i in range(len(given))]
    if sorted(given) != letters:
        raise RowError(f"options are lettered {', '.join(given)}, not {', '.join(letters)}")
    return [given[letter] for letter in letters]
