"""Find the tags of a completion, in one pass and in linear time. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

# Loose on purpose: `<Answer>`, `< answer >` and `</answer x>` are found too, so that a second tag
# cannot hide behind its spelling. Possessive repeats, and no part can cross a `<`: linear.
_TAG = re.compile(r"<\s*+(/?+)\s*+(think|answer)(?![\w-])[^<>]*+>", re.IGNORECASE)


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


def find_tags(text: str) -> list[Tag]:
    """Return the first MOST_TAGS think and answer tags of a text, misspelled ones included."""
    return list(islice(_tags(text), MOST_TAGS))


def _tags(text: str) -> Iterator[Tag]:
    for match in _TAG.finditer(text):
        name, closing = match[2].lower(), bool(match[1])
        exact = match[0] == (f"</{name}>" if closing else f"<{name}>")
        yield Tag(name, closing, exact, match.start(), match.end())
