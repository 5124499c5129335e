"""Find the tags of a completion, in one pass and in linear time. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

# Loose on purpose: `<Answer>`, `< answer >` and `</answer x>` are found too, so that a second tag
# cannot hide behind its spelling. Possessive repeats, and no part can cross a `<`: linear.
_TAG = r"<\s*+(/?+)\s*+({names})(?![\w-])[^<>]*+>"
OURS = ("think", "answer")


MOST_TAGS = 64
"""No mode has more than a few. Past this a text is noise, and is neither read nor well-formed."""


@dataclass(frozen=True, slots=True)
class Tag:
    """One tag of a text: text[start:end]."""

    name: str  # lower case
    closing: bool
    exact: bool  # spelled `<name>` or `</name>` to the character
    start: int
    end: int


def find_tags(text: str, more: tuple[str, ...] = ()) -> list[Tag]:
    """Return the first MOST_TAGS tags of a text called think, answer or one of `more` (letters),
    misspelled ones included."""
    return list(islice(_tags(text, _pattern(more)), MOST_TAGS))


@lru_cache
def _pattern(more: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(_TAG.format(names="|".join(dict.fromkeys((*OURS, *more)))), re.IGNORECASE)


def _tags(text: str, pattern: re.Pattern[str]) -> Iterator[Tag]:
    for match in pattern.finditer(text):
        name, closing = match[2].lower(), bool(match[1])
        exact = match[0] == (f"</{name}>" if closing else f"<{name}>")
        yield Tag(name, closing, exact, match.start(), match.end())
