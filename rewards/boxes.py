"""How well do the boxes of an answer cover the gold ones? In [0, 1].

A box is x1, y1, x2, y2 with x1 < x2 and y1 < y2, in the gold answer's units; nothing is rescaled.
Read are `[10, 20, 30, 40]`, `(10 20 30 40)`, `(10,20),(30,40)`, each with anything around it (JSON,
`<box>`), any number of them, and, where there is none of these, exactly four numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from medrl.actors.types import Prompt, Score
from medrl.rewards.modes import Mode
from medrl.rewards.open_answers import nothing

_N = r"([-+]?[0-9]++(?:\.[0-9]++)?+)"
_APART = r"(?:\s*+,\s*+|\s++)"
_PAIR = rf"[\[(]\s*+{_N}{_APART}{_N}\s*+[\])]"
_FOUR = rf"[\[(]\s*+{_APART.join([_N] * 4)}\s*+[\])]"
_BOX = re.compile(rf"{_FOUR}|{_PAIR}\s*+,?\s*+{_PAIR}")
_BARE = re.compile(rf"(?<!\w){_N}")

Box = tuple[float, float, float, float]
MOST_BOXES = 32
"""More in one answer are noise."""
_FARTHEST = 1e6  # a coordinate beyond it is noise too


@dataclass(frozen=True, slots=True)
class BoxIou:
    """Intersection over union with the gold box. Of several boxes: the best pairs first, each box
    in one pair, their sum over the larger number of boxes, so that more boxes gain nothing. A pair
    below `threshold` counts 0.
    """

    threshold: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError("threshold needs to be between 0 and 1")

    def __call__(self, mode: Mode, prompt: Prompt, completion: str) -> float | Score:
        answer = mode.read(completion)
        if answer.text is None:
            return nothing(answer.reason)
        want, got = boxes(prompt.answer), boxes(answer.text)
        if not want or not all(map(_is_whole, want)):
            return nothing("the gold answer is no box")
        if not got or len(got) > MOST_BOXES:
            return nothing("no box" if not got else f"more than {MOST_BOXES} boxes")
        return self._paired(want, got) / max(len(want), len(got))

    def _paired(self, want: list[Box], got: list[Box]) -> float:
        pairs = [(iou(w, g), i, j) for i, w in enumerate(want) for j, g in enumerate(got)]
        taken: set[tuple[str, int]] = set()
        total = 0.0
        for value, i, j in sorted(pairs, reverse=True):
            if value >= self.threshold and not taken & {("want", i), ("got", j)}:
                taken |= {("want", i), ("got", j)}
                total += value
        return total


def boxes(text: str) -> list[Box]:
    """Return the boxes written in a text, whole or not; at most one more than MOST_BOXES."""
    found: list[Box] = []
    for match in _BOX.finditer(text):
        x1, y1, x2, y2 = (float(number) for number in match.groups() if number is not None)
        found.append((x1, y1, x2, y2))
        if len(found) > MOST_BOXES:
            break
    if found:
        return found
    bare = [float(match[1]) for _, match in zip(range(5), _BARE.finditer(text), strict=False)]
    return [(bare[0], bare[1], bare[2], bare[3])] if len(bare) == 4 else []


def iou(one: Box, other: Box) -> float:
    """Return intersection over union; 0 where either is no box."""
    if not (_is_whole(one) and _is_whole(other)):
        return 0.0
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    union = _area(one) + _area(other) - shared
    return min(1.0, shared / union) if union > 0 else 0.0


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _is_whole(box: Box) -> bool:
    x1, y1, x2, y2 = box
    return x1 < x2 and y1 < y2 and max(map(abs, box)) <= _FARTHEST
