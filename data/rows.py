"""What the readers of all formats share: a row as it was read, and the list of problems."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medrl.actors.types import LETTERS, Prompt
from medrl.configs.errors import UserError
from medrl.configs.loader import did_you_mean
from medrl.data import names
from medrl.data.gold import GoldError, GoldKind, gold_letter
from medrl.data.image_files import leaves_root

SHOWN = 20
"""Problems told one by one; of the others only the number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row as a format's reader found it: names and gold answer still as they were written."""

    where: str  # file and row, for messages
    id: str
    question: str
    options: tuple[str, ...]
    gold: str | int
    gold_kind: GoldKind
    images: tuple[str, ...]
    modality: str
    question_type: str
    source: str
    images_may_miss: bool = False  # rows whose images their publisher could not pass on


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """All rows of a data set, and the folder their image paths are relative to."""

    rows: tuple[Row, ...]
    root: Path
    holds_images: bool = False  # then `root` it is, whatever `data.images` says


@dataclass(slots=True)
class Problems:
    """Collects what is wrong, so that a person hears of all of it at once."""

    found: list[str] = field(default_factory=list)

    def add(self, where: object, reason: str) -> None:
        self.found.append(f"{where}: {reason}")

    def raise_if_any(self) -> None:
        if not self.found:
            return
        shown = self.found[:SHOWN]
        if len(self.found) > SHOWN:
            shown.append(
                f"... and {len(self.found) - SHOWN} more: {len(self.found)} problems in all"
            )
        raise UserError(*shown)


class RowError(ValueError):
    """A row cannot be used; the message is the reason."""


def to_prompt(row: Row) -> Prompt:
    """Make a prompt of a row: names canonical, gold a letter. Raises `RowError`."""
    _check_texts(row)
    if len(row.options) == 1:
        raise RowError(f"a single option ({row.options[0]!r}): a choice needs 2 to {len(LETTERS)}")
    if len(row.options) > len(LETTERS):
        raise RowError(f"{len(row.options)} options, at most {len(LETTERS)} are possible")
    for image in row.images:
        if reason := leaves_root(image):
            raise RowError(f"image {image!r} {reason}")
    try:
        answer = gold_letter(row.gold, row.options, row.gold_kind) if row.options else str(row.gold)
    except GoldError as error:
        raise RowError(str(error)) from None
    return Prompt(
        id=row.id,
        question=row.question,
        options=row.options,
        answer=answer,
        images=row.images,
        modality=names.modality(row.modality),
        question_type=names.question_type(row.question_type),
        source=row.source,
    )


def _check_texts(row: Row) -> None:
    for name, text in (("id", row.id), ("question", row.question), ("answer", str(row.gold))):
        if not text.strip():
            raise RowError(f"the {name} is empty")
    if any(not option.strip() for option in row.options):
        raise RowError(f"an option is empty: {list(row.options)}")
    texts = (row.id, row.question, str(row.gold), *row.options, *row.images, row.modality)
    try:
        "".join((*texts, row.question_type, row.source)).encode()
    except UnicodeEncodeError:
        raise RowError("holds half a surrogate pair (\\ud800 to \\udfff), not text") from None


def text_of(value: object, name: str) -> str:
    """Return a text or number as text; raise `RowError` for anything else."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int | float):
        return str(value)
    kind = "null" if value is None else type(value).__name__
    raise RowError(f"{name} must be text, got {kind}")


def require(record: dict[str, Any], key: str) -> Any:
    """Return `record[key]`; raise `RowError` with the nearest key there is."""
    if key not in record:
        raise RowError(f"no key {key!r}; {did_you_mean(key, record)}")
    return record[key]


def read_json_rows(path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and row, record) of a JSON file that holds a list of objects; rows from 1."""
    data = parse_json(_read(path, problems), str(path), problems)
    if data is None:
        return
    if not isinstance(data, list):
        problems.add(path, f"must hold a JSON list of rows, got {type(data).__name__}")
        return
    yield from _objects(((f"{path}: row {n}", r) for n, r in enumerate(data, 1)), problems)


def read_json_lines(path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and line, record) of a file with one JSON object a line."""
    text = _read(path, problems) or ""
    # Not splitlines(): it also splits at U+2028 and the like, which JSON texts may hold.
    lines = ((f"{path}: line {n}", line) for n, line in enumerate(text.split("\n"), 1))
    parsed = ((at, parse_json(line, at, problems)) for at, line in lines if line.strip())
    yield from _objects(((at, record) for at, record in parsed if record is not None), problems)


def _objects(
    rows: Iterable[tuple[str, Any]], problems: Problems
) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, record in rows:
        if isinstance(record, dict):
            yield where, record
        else:
            problems.add(where, f"must be a JSON object, got {type(record).__name__}")


def _read(path: Path, problems: Problems) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        problems.add(path, f"is not UTF-8 text (byte {error.start})")
    except OSError as error:
        problems.add(path, f"cannot be read: {error.strerror}")
    return None


def parse_json(text: str | None, where: str, problems: Problems) -> Any:
    """Return what a JSON text holds, None where it is broken (line and column are reported)."""
    if text is None:
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"column {error.colno}"
        if "\n" in text:
            at = f"line {error.lineno}, {at}"
        problems.add(where, f"broken JSON at {at}: {error.msg}")
    except (ValueError, RecursionError) as error:  # numbers or nesting beyond all measure
        problems.add(where, f"JSON that cannot be read: {error}")
    return None
