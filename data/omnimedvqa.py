"""OmniMedVQA as it lies on disk: QA_information/**/*.json and Images/. Standard library only.

A record holds dataset, question_id, question_type, question, gt_answer (a text), image_path
("Images/..."), option_A to option_D (some absent), and modality_type or, in some files, modality.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from medrl.configs.loader import did_you_mean
from medrl.data.rows import Problems, Row, RowError, Source, read_json_rows, require, text_of

_QA = "QA_information"
_RESTRICTED = "Restricted-access"
"""Folder of questions whose images the data set's authors may not pass on."""

_OPTION = re.compile(r"option_([A-Z])")


def read(path: Path, problems: Problems) -> Source:
    """Read the data set's folder, or a folder or file of its records."""
    rows: list[Row] = []
    for file in _files(path, problems):
        restricted = _RESTRICTED in file.parts
        for where, record in read_json_rows(file, problems):
            try:
                rows.append(_row(record, where, file.stem, restricted))
            except RowError as error:
                problems.add(where, str(error))
    return Source(rows=tuple(rows), root=_root(path))


def _files(path: Path, problems: Problems) -> list[Path]:
    if path.is_file():
        return [path]
    folder = path / _QA if (path / _QA).is_dir() else path
    files = sorted(folder.rglob("*.json"))
    deeper = next((inner.parent for inner in path.glob(f"*/{_QA}")), None)
    if folder == path and deeper:
        problems.add(path, f"the data set lies one folder deeper: give {deeper}")
        return []
    if not files:
        problems.add(path, f"no .json file here: give the folder that holds {_QA} and Images")
    return files


def _root(path: Path) -> Path:
    """The folder that holds Images: paths in the records start with it."""
    for folder in (path, *path.parents):
        if folder.name == _QA:
            return folder.parent
    return path.parent if path.is_file() else path


def _row(record: dict[str, Any], where: str, stem: str, restricted: bool) -> Row:
    modality = "modality_type" if "modality_type" in record else "modality"
    if modality not in record:
        raise RowError(f"no key 'modality_type'; {did_you_mean('modality_type', record)}")
    return Row(
        where=where,
        id=text_of(require(record, "question_id"), "question_id"),
        question=text_of(require(record, "question"), "question"),
        options=_options(record),
        gold=text_of(require(record, "gt_answer"), "gt_answer"),
        gold_kind="text",
        images=(text_of(require(record, "image_path"), "image_path"),),
        modality=text_of(record[modality], modality),
        question_type=text_of(require(record, "question_type"), "question_type"),
        source=text_of(record.get("dataset", stem), "dataset"),
        images_may_miss=restricted,
    )


def _options(record: dict[str, Any]) -> tuple[str, ...]:
    """Options in the order of their letters; absent, null and empty ones do not count."""
    keys = sorted(key for key in record if _OPTION.fullmatch(key))
    options = tuple(
        text_of(record[key], key) for key in keys if record[key] is not None and record[key] != ""
    )
    if not options:
        raise RowError(f"no options; {did_you_mean('option_A', record)}")
    return options
