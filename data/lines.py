"""Prompts written as JSON lines with our own columns, which format "jsonl" reads back the same."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medrl.actors.types import LETTERS, Prompt
from medrl.data.gold import GoldError, gold_letter
from medrl.data.tables import read_options


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> int:
    """Write a file, whole or not at all; return the number of prompts. Raises `OSError`."""
    lines = [json.dumps(_record(prompt), ensure_ascii=False) for prompt in prompts]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    aside.replace(path)
    return len(lines)


def _record(prompt: Prompt) -> dict[str, Any]:
    options = _unlabelled(prompt.options)
    return {
        "id": prompt.id,
        "question": prompt.question,
        "options": options,
        "answer": _gold(prompt),
        "images": list(prompt.images),
        "modality": prompt.modality,
        "question_type": prompt.question_type,
        "source": prompt.source,
    }


def _unlabelled(options: tuple[str, ...]) -> list[str]:
    """Options that look labelled get labels of ours, for the reader takes one label off."""
    if read_options({"options": list(options)}) == options:
        return list(options)
    return [f"{letter}: {option}" for letter, option in zip(LETTERS, options, strict=False)]


def _gold(prompt: Prompt) -> str | int:
    """The letter, in a spelling that is not also the text of another option."""
    if not prompt.options:
        return prompt.answer
    letter = prompt.answer
    for gold in (letter, f"({letter})", f"{letter})", f"{letter}:", LETTERS.index(letter)):
        try:
            if gold_letter(gold, prompt.options, "either") == prompt.answer:
                return gold
        except GoldError:
            continue
    raise ValueError(f"prompt {prompt.id}: no way to write gold {prompt.answer} of its options")
