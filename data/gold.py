"""A gold answer, however a data set writes it, becomes a letter. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from medrl.actors.types import LETTERS

GoldKind = Literal["text", "label", "either"]
"""What a gold answer is. `text`: an option's text (OmniMedVQA). `label`: a letter (Med-R1).
`either`: the data set does not say; readings that disagree are refused."""

_LABEL = re.compile(rf"\(?\s*([{LETTERS}])\s*[).:]?", re.IGNORECASE)


class GoldError(ValueError):
    """The gold answer names no option, or more than one."""


def gold_letter(gold: str | int, options: Sequence[str], kind: GoldKind) -> str:
    """Return the letter of the option that `gold` means; raise `GoldError`.

    Texts are compared exactly and, where that finds nothing, without case, trailing periods and
    extra spaces. An integer is an index from 0, as in a `ClassLabel`, or an option's text.
    """
    text = str(gold)
    found: set[int] = set()
    if kind in ("text", "either"):
        found |= _by_text(text, options)
        if len(found) > 1:
            letters = " and ".join(LETTERS[i] for i in sorted(found))
            raise GoldError(f"gold {text!r} is the text of options {letters}")
    if kind in ("label", "either"):
        found |= _by_label(gold, len(options))
        if len(found) > 1:
            letters = " or ".join(LETTERS[i] for i in sorted(found))
            raise GoldError(f"gold {text!r} may mean option {letters}: its text or its label")
    if not found:
        shown = ", ".join(f"{LETTERS[i]}) {option}" for i, option in enumerate(options))
        raise GoldError(f"gold {text!r} is not among the options {shown}")
    return LETTERS[found.pop()]


def _by_text(gold: str, options: Sequence[str]) -> set[int]:
    exact = {i for i, option in enumerate(options) if option == gold}
    if exact:
        return exact
    wanted = plain(gold)
    return {i for i, option in enumerate(options) if plain(option) == wanted}


def _by_label(gold: str | int, num_options: int) -> set[int]:
    if isinstance(gold, int):
        return {gold} if 0 <= gold < num_options else set()
    match = _LABEL.fullmatch(gold.strip())
    index = LETTERS.index(match.group(1).upper()) if match else num_options
    return {index} if index < num_options else set()


def plain(text: str) -> str:
    """Return a text as it is compared: without case, trailing periods and extra spaces."""
    return " ".join(text.casefold().split()).rstrip(". ")
