"""What lies at a path: which format of data set, and which splits. Standard library only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medrl.configs.errors import UserError
from medrl.data.load import near

Format = Literal["omnimedvqa", "med_r1", "jsonl", "huggingface"]
Side = Literal["train", "test"]

_LOOKS_LIKE: tuple[tuple[str, Format], ...] = (
    ("problem", "med_r1"),
    ("gt_answer", "omnimedvqa"),
    ("question_id", "omnimedvqa"),
)
"""A key of a JSON record -> the format it is of."""

_PEEK = 65_536  # characters; the first record's keys stand in them


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSplit:
    """A split as `DataConfig` would name it."""

    name: str  # "train", "test", or "" where the data set is not divided
    format: Format
    path: str  # of DataConfig.train or .test
    side: Side  # which of the two reads it


def detect(path: Path) -> tuple[FoundSplit, ...]:
    """Return the splits at `path`: one, or train and test. Raises `UserError`: no data set."""
    name, colon, split = str(path).rpartition(":")
    if not path.exists() and colon and Path(name).is_dir():
        side = _side(split)
        return (FoundSplit(name=split, format="huggingface", path=str(path), side=side),)
    if not path.exists():
        raise UserError(f"no such file or folder: {path}{near(path)}")
    if path.is_dir():
        _refuse_two_divisions(path)
        if both := _both_splits(path):
            return both
    found = _format_of_file(path) if path.is_file() else _format_of_folder(path)
    if found is None:
        raise UserError(
            f"{path} is no data set: needs a folder with QA_information (OmniMedVQA), .json files "
            "of image, problem and solution (Med-R1), .jsonl files, Parquet files, a save_to_disk "
            "folder, or a folder that holds train and test of these"
        )
    name = _named_split(path)
    return (FoundSplit(name=name, format=found, path=str(path), side=_side(name)),)


def _refuse_two_divisions(path: Path) -> None:
    divisions = [path / name for name in ("modality", "question_type") if (path / name).is_dir()]
    if len(divisions) == 2:
        raise UserError(
            f"{path} holds two divisions of one data set, drawn independently: give "
            f"{divisions[0]} or {divisions[1]}"
        )


def _both_splits(path: Path) -> tuple[FoundSplit, ...]:
    """Train and test where a folder holds both: as folders, as files, or mixed by file name."""
    if (path / "dataset_dict.json").is_file():
        return tuple(
            FoundSplit(name=side, format="huggingface", path=f"{path}:{side}", side=side)
            for side in _SIDES
            if (path / side).is_dir()
        )
    pairs: list[tuple[Path, Path]] = [(path / "train", path / "test")]
    for suffix in (".jsonl", ".json", ".parquet"):
        pairs.append((path / f"train{suffix}", path / f"test{suffix}"))
    for pair in pairs:
        formats = [_format_at(one) for one in pair]
        if all(formats):
            return tuple(
                FoundSplit(name=side, format=found, path=str(one), side=side)
                for side, one, found in zip(_SIDES, pair, formats, strict=True)
                if found
            )
    sides = {_named_split(file) for file in path.glob("*.json")}
    if sides >= {"train", "test"} and _format_of_folder(path) == "med_r1":
        return tuple(
            FoundSplit(name=side, format="med_r1", path=str(path), side=side) for side in _SIDES
        )
    return ()


_SIDES: tuple[Side, Side] = ("train", "test")


def _format_at(path: Path) -> Format | None:
    if path.is_file():
        return _format_of_file(path)
    return _format_of_folder(path) if path.is_dir() else None


def _format_of_folder(path: Path) -> Format | None:
    if (path / "QA_information").is_dir():
        return "omnimedvqa"
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return "huggingface"
    for suffix in (".jsonl", ".parquet", ".json"):
        found = _first(_format_of_file(file) for file in sorted(path.glob(f"*{suffix}")))
        if found:
            return found
    # A part of OmniMedVQA's QA_information: its .json files lie deeper, or are read above.
    deeper = sorted(path.rglob("*.json")) if "QA_information" in path.parts else []
    return "omnimedvqa" if deeper else None


def _first(formats: Iterable[Format | None]) -> Format | None:
    return next((found for found in formats if found), None)


def _format_of_file(path: Path) -> Format | None:
    if path.suffix == ".jsonl":
        return "jsonl"
    if path.suffix == ".parquet":
        return "huggingface"
    if path.suffix != ".json":
        return None
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            start = file.read(_PEEK)
    except OSError:
        return None
    if not start.lstrip().startswith("["):
        return None
    # By its keys, in whatever order, so that a broken file is read and its flaw told.
    keys = set(re.findall(r'"([A-Za-z_]+)"\s*:', start))
    found = _first(format_ if key in keys else None for key, format_ in _LOOKS_LIKE)
    return found or ("med_r1" if keys & {"solution", "image"} or _is_empty_list(start) else None)


def _is_empty_list(start: str) -> bool:
    try:
        return bool(json.loads(start) == [])
    except ValueError:
        return False


def _named_split(path: Path) -> str:
    """ "train" or "test" where the name of a file or folder says so, or all files in it do."""
    if path.is_dir() and path.name not in _SIDES:
        inside = {_named_split(file) for file in path.glob("*.json*")}
        return inside.pop() if len(inside) == 1 else ""
    ending = re.search(r"(?:^|_)(train|test)$", path.stem)
    return ending.group(1) if ending else ""


def _side(name: str) -> Side:
    return "test" if name == "test" else "train"
