"""Run an importer over the files of a data set, whatever their format."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medrl.actors.types import Prompt
from medrl.configs.errors import UserError
from medrl.configs.loader import did_you_mean
from medrl.data.gold import GoldKind
from medrl.data.huggingface import open_rows, save_image
from medrl.data.importers import IMPORTERS, Cells, Record
from medrl.data.rows import Problems, RowError, read_json_lines, read_json_rows, to_prompt
from medrl.data.tables import Table

_SPLIT_OF_FILE = re.compile(r"(train|test|validation|val|dev)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What an import read."""

    prompts: tuple[Prompt, ...]
    left_out: int  # records the importer leaves out on purpose
    problems: tuple[str, ...]  # a sentence for each row that cannot be used
    holds_images: bool  # images were written below `images_into`


def import_prompts(name: str, source: str, images_into: Path) -> Imported:
    """Read a data set at `source`: .json, .jsonl, .csv, Parquet, or a folder ("folder:split").

    Images inside it are written below `images_into`; others stay where they are, with the paths
    the data set gives them. Raises `UserError`: an unknown name, no data set.
    """
    if name not in IMPORTERS:
        raise UserError(f"no importer {name!r}; {did_you_mean(name, IMPORTERS)}")
    importer, problems = IMPORTERS[name], Problems()
    stem = Path(source.replace(":", "-")).stem
    saved: list[str] = []
    folder, records = _records(source, problems)

    def save(cell: Any) -> str:
        saved.append(save_image(cell, folder, images_into))
        return saved[-1]

    left_out = 0

    def cells() -> Iterator[tuple[str, Cells]]:
        nonlocal left_out
        for where, record in records:  # one at a time: images are in them
            try:
                found = importer.cells(record)
            except RowError as error:
                problems.add(where, str(error))
                continue
            if found is None:
                left_out += 1
            else:
                yield where, {"source": importer.source, **found}

    table = Table(source, f"{name}/{stem}", {}, save)
    prompts = _prompts(table, cells(), importer.gold_kind, problems)
    return Imported(
        prompts=tuple(prompts),
        left_out=left_out,
        problems=_once(source, problems.found) if not prompts else tuple(problems.found),
        holds_images=bool(saved),
    )


def _once(source: str, sentences: list[str]) -> tuple[str, ...]:
    """Of rows that are all wrong for one reason (a column is missing), tell it once."""
    reasons = {re.sub(r"^.*?: (row|line) \d+: ", "", sentence) for sentence in sentences}
    if len(reasons) > 1 or len(sentences) < 2:
        return tuple(sentences)
    return (f"{source}: all {len(sentences)} rows: {reasons.pop()}",)


def _prompts(
    table: Table, found: Iterable[tuple[str, Cells]], kind: GoldKind, problems: Problems
) -> list[Prompt]:
    prompts: dict[str, Prompt] = {}
    for row in table.rows(found, problems):
        try:
            prompt = to_prompt(replace(row, gold_kind=kind))
        except RowError as error:
            problems.add(row.where, str(error))
            continue
        if prompt.id in prompts:
            problems.add(row.where, f"id {prompt.id!r} is there already")
        prompts.setdefault(prompt.id, prompt)
    return list(prompts.values())


def _records(source: str, problems: Problems) -> tuple[Path, Iterator[tuple[str, Record]]]:
    """Return the folder that image paths are relative to, and (file and row, record)s."""
    path = Path(source)
    readers = {".json": read_json_rows, ".jsonl": read_json_lines, ".csv": _read_csv}
    if path.is_file() and path.suffix in readers:
        return path.parent, readers[path.suffix](path, problems)
    files = _parquet_files(path) if path.is_dir() else [path]
    if path.suffix == ".parquet" or any(file.suffix == ".parquet" for file in files):
        return path, _read_tables([str(file) for file in files], problems)
    if path.exists() or Path(source.rpartition(":")[0] or "-").is_dir():
        return path, _read_tables([source], problems)
    raise UserError(f"no such file or folder: {source}")


def _parquet_files(folder: Path) -> list[Path]:
    """The Parquet files in a folder or below; files of several splits are refused."""
    files = sorted(folder.rglob("*.parquet"))
    splits = {match.group(1) for file in files if (match := _SPLIT_OF_FILE.match(file.name))}
    if len(splits) > 1:
        raise UserError(
            f"{folder} holds files of {', '.join(sorted(splits))}: import one at a time, by file, "
            "or from a folder that holds only it"
        )
    return files or [folder]


def _read_tables(sources: Iterable[str], problems: Problems) -> Iterator[tuple[str, Record]]:
    for source in sources:
        opened = open_rows(source, "train", problems)
        number = 0
        for batch in opened.batches if opened else ():
            for record in batch:
                number += 1
                yield f"{source}: row {number}", record


def _read_csv(path: Path, problems: Problems) -> Iterator[tuple[str, Record]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, record in enumerate(csv.DictReader(file), 1):
                yield f"{path}: row {number}", record
    except UnicodeDecodeError as error:
        problems.add(path, f"is not UTF-8 text (byte {error.start})")
    except (OSError, csv.Error) as error:
        problems.add(path, f"cannot be read: {error}")
