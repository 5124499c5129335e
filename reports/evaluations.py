"""Which of the evaluations in a run's directory says how good the run's model is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from medrl.configs.errors import UserError
from medrl.reports.lines import read_lines


def newest_evaluation(folder: Path, asked: Mapping[str, Any], starting: str) -> Mapping[str, Any]:
    """`medrl eval`'s newest file of a model of this run, asked as it was trained; else the last of
    the run itself. `asked`: what it must say of itself, where it does: mode, test set, how much of
    it. `starting`: the model that counts as the run's too, where nothing was trained.

    `medrl eval` writes there whatever it is given with the run's config: the starting model, for
    one, whose numbers are none of the training's. Raises `UserError` where there is none.
    """
    files = sorted(folder.glob("evals/*.json"), key=lambda file: file.stat().st_mtime)
    for file in reversed(files):
        found: Mapping[str, Any] = read_json(file, dict)
        checkpoint = found.get("checkpoint")  # evaluations of experiments do not say
        ours = checkpoint is None or checkpoint == starting or _is_of(folder, str(checkpoint))
        if ours and all(found.get(key, value) == value for key, value in asked.items()):
            return found
    lines = read_lines(folder / "evals.jsonl")
    if not lines:
        others = (
            f"; those in {folder / 'evals'} are of other models, modes or questions"
            if files
            else ""
        )
        raise UserError(f"{folder}: has no evaluation yet (evals.jsonl, evals/*.json){others}")
    return lines[-1]


def _is_of(folder: Path, checkpoint: str) -> bool:
    """By names alone: the path was relative to another directory, or the run has been moved."""
    name, parts = folder.resolve().name, Path(checkpoint).parts
    pairs = pairwise(parts)
    return any(pair in ((name, "export"), (name, "checkpoints")) for pair in pairs)


def read_json(path: Path, kind: type) -> Any:
    """Raises `UserError` where the file holds something else than a `kind`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # bad JSON and bad UTF-8 are ValueErrors
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, kind):
        raise UserError(f"{path}: holds a {type(found).__name__}, needs a {kind.__name__}")
    return found
