"""Find the tags of a completion, in one pass and in linear time. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Loose on purpose: `<Answer>`, `< answer >` and `</answer x>` are found too, so that a second tag
# cannot hide behind its spelling. Possessive repeats, and no part can cross a `<`: linear.
_TAG = re.compile(r"<\s*+(/?+)\s*+(think|answer)(?![\w-])[^<>]*+>", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Tag:
    """One tag of a text: text[start:end]."""

    name: str  # lower case
    closing: bool
    exact: bool  # spelled `<name>` or `</name>` to the character
    start: int
    end: int


def find_tags(text: str) -> list[Tag]:
    """Return the think and answer tags of a text in order, misspelled ones included."""
    tags = []
    for match in _TAG.finditer(text):
        name, closing = match[2].lower(), bool(match[1])
        exact = match[0] == (f"</{name}>" if closing else f"<{name}>")
        tags.append(Tag(name, closing, exact, match.start(), match.end()))
    return tags
