"""Groups -> rows -> micro-batches -> tensors: what each rank runs, in which order.

Owner of two invariants. Every rank runs the same number of micro-batches, and in each of them
either all ranks run the vision tower or none does (ZeRO-3 hangs otherwise). A group is never split
over micro-batches or ranks. Which rank runs what follows from token counts alone, so all ranks
compute the same plan without talking.

A row is one prompt and some of its completions (`attention.py`): a group is one row, or, where
sharing the prompt gains too little, a row a completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WORTH_SHARING = 1.3
"""Least token ratio, padded rows to a shared row, at which a group is one row. Below, rows of one
completion each pad less than a row as wide as its longest completion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSize:
    """What planning needs to know of a group."""

    prompt: int  # tokens, image placeholders included
    completions: tuple[tuple[int, int], ...]  # (index in the group, tokens) of the trained ones
    images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A prompt and some of its completions."""

    group: int  # index in the batch
    completions: tuple[int, ...]  # indices in the group


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The rows of one forward pass on one rank; no rows: it only keeps the others company."""

    rows: tuple[Row, ...]
    vision: bool  # whether the vision tower runs, with a blank image if the rows have none


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What every rank runs."""

    ranks: tuple[tuple[MicroBatch, ...], ...]  # [W][M], the same M for all
    tokens: int  # of all rows, padding included
    padded_tokens: int  # of the same completions, each in a row with a prompt of its own, unpadded

    @property
    def sharing(self) -> float:
        """Tokens of padded rows over tokens of the rows run."""
        return self.padded_tokens / self.tokens if self.tokens else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """A group as it will be run."""

    group: int
    size: GroupSize
    shared: bool

    @property
    def slots(self) -> int:
        return len(self.size.completions) if self.shared else 1

    @property
    def num_rows(self) -> int:
        return 1 if self.shared else len(self.size.completions)

    @property
    def longest(self) -> int:
        return max(tokens for _, tokens in self.size.completions)

    @property
    def tokens(self) -> int:
        return _tokens([self])

    def rows(self) -> tuple[Row, ...]:
        indices = tuple(index for index, _ in self.size.completions)
        if self.shared:
            return (Row(group=self.group, completions=indices),)
        return tuple(Row(group=self.group, completions=(index,)) for index in indices)


def plan_rows(sizes: Sequence[GroupSize], *, world: int, budget: int) -> Plan:
    """Spread groups over `world` ranks and cut micro-batches of at most `budget` tokens.

    Groups without a trained completion are left out. A group that alone exceeds the budget runs
    alone, whole.
    """
    units = [_unit(group, size) for group, size in enumerate(sizes) if size.completions]
    cut = [_cut(mine, budget) for mine in _balance(units, world)]
    length = max(1, *(len(batches) for batches in cut))  # a step needs a backward pass
    columns = [[b[m] if m < len(b) else [] for b in cut] for m in range(length)]
    vision = [any(unit.size.images for units in column for unit in units) for column in columns]
    return Plan(
        ranks=tuple(
            tuple(
                MicroBatch(rows=tuple(row for u in column[rank] for row in u.rows()), vision=see)
                for column, see in zip(columns, vision, strict=True)
            )
            for rank in range(world)
        ),
        tokens=sum(_tokens(units) for batches in cut for units in batches),
        padded_tokens=sum(
            unit.size.prompt + tokens for unit in units for _, tokens in unit.size.completions
        ),
    )


def _unit(group: int, size: GroupSize) -> _Unit:
    lengths = [tokens for _, tokens in size.completions]
    shared = size.prompt + len(lengths) * max(lengths)
    apart = sum(size.prompt + tokens for tokens in lengths)
    return _Unit(group=group, size=size, shared=apart / shared >= WORTH_SHARING)


def _tokens(units: Sequence[_Unit]) -> int:
    """Tokens of a micro-batch of these, padding included."""
    rows = sum(unit.num_rows for unit in units)
    slots = max(unit.slots for unit in units)
    longest = max(unit.longest for unit in units)
    return rows * (max(unit.size.prompt for unit in units) + slots * longest)


def _balance(units: Sequence[_Unit], world: int) -> list[list[_Unit]]:
    """Largest first, each to the rank with the fewest tokens so far."""
    ranks: list[list[_Unit]] = [[] for _ in range(world)]
    loads = [0] * world
    for unit in sorted(units, key=lambda unit: (-unit.tokens, unit.group)):
        rank = loads.index(min(loads))
        ranks[rank].append(unit)
        loads[rank] += unit.tokens
    return ranks


def _cut(units: Sequence[_Unit], budget: int) -> list[list[_Unit]]:
    """Neighbours in size share a micro-batch; shared and unshared groups do not."""
    batches: list[list[_Unit]] = []
    for unit in sorted(units, key=lambda unit: (not unit.shared, -unit.tokens, unit.group)):
        if batches and batches[-1][0].shared == unit.shared:
            wider = [*batches[-1], unit]
            if _tokens(wider) <= budget:
                batches[-1] = wider
                continue
        batches.append([unit])
    return batches
