"""The hidden scene behind a phantom: what is drawn, and so what can be asked.

Standard library only. Factors are dealt from shuffled decks, not rolled: in every modality each
value of a factor is as frequent as the others, so no question can be answered without looking.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

Modality = Literal["CT", "MR", "X-Ray", "Ultrasound", "Dermoscopy", "Fundus", "OCT", "Microscopy"]
Shape = Literal["Round", "Bean", "Wedge", "Lobed"]
Kind = Literal["None", "Cyst", "Ring", "Nodule"]
Side = Literal["Left", "Right", "Upper", "Lower"]

MODALITIES: tuple[Modality, ...] = get_args(Modality)
SHAPES: tuple[Shape, ...] = get_args(Shape)
KINDS: tuple[Kind, ...] = get_args(Kind)  # "None": healthy
SIDES: tuple[Side, ...] = get_args(Side)
MAX_LESIONS = 3

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One organ and its lesions. All lesions are of one kind and lie on one side of the organ."""

    modality: Modality
    shape: Shape
    large: bool
    lesions: int  # 0 to MAX_LESIONS
    kind: Kind  # "None" exactly where there are no lesions
    side: Side  # without meaning where there are no lesions

    def __post_init__(self) -> None:
        if (self.lesions == 0) != (self.kind == "None"):
            raise ValueError(f"{self.lesions} lesion(s) of kind {self.kind!r}")


def deal(count: int, rng: random.Random) -> list[Scene]:
    """`count` scenes, modalities in turn, every factor balanced within each modality."""
    per_modality = -(-count // len(MODALITIES))
    dealt = [_of_modality(modality, per_modality, rng) for modality in MODALITIES]
    return [dealt[i % len(MODALITIES)][i // len(MODALITIES)] for i in range(count)]


def _of_modality(modality: Modality, count: int, rng: random.Random) -> list[Scene]:
    lesions = _deck(range(MAX_LESIONS + 1), count, rng)
    kinds = iter(_deck(KINDS[1:], sum(n > 0 for n in lesions), rng))
    shapes = _deck(SHAPES, count, rng)
    sizes = _deck((False, True), count, rng)
    sides = _deck(SIDES, count, rng)
    return [
        Scene(
            modality=modality,
            shape=shapes[i],
            large=sizes[i],
            lesions=lesions[i],
            kind=next(kinds) if lesions[i] else "None",
            side=sides[i],
        )
        for i in range(count)
    ]


def _deck(values: Sequence[_T], count: int, rng: random.Random) -> list[_T]:
    """`count` cards, each value as often as the others (give or take one), shuffled."""
    cards = [values[i % len(values)] for i in range(count)]
    rng.shuffle(cards)
    return cards
