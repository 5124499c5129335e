"""Which prompt is drawn when, and from which random stream. Standard library only.

Both are plain functions of (run seed, draw), so a run resumes from the number of the next draw and
nothing else.
"""

from __future__ import annotations

from functools import lru_cache
from random import Random

_STREAMS = 2**31
"""Streams of one run: completions it can draw before `group_seed` refuses."""

_ODD = 0x9E3779B1
"""Multiplying by an odd number is one-to-one modulo a power of two; this one also scatters."""


class Schedule:
    """Draw d (0, 1, 2, ...) -> index of a prompt. Every epoch is a fresh seeded permutation or,
    where not `shuffled`, the prompts as they stand."""

    def __init__(self, num_prompts: int, seed: int, *, shuffled: bool = True) -> None:
        if num_prompts < 1:
            raise ValueError(f"a schedule needs at least one prompt, got {num_prompts}")
        self.num_prompts = num_prompts
        self.seed = seed
        self.shuffled = shuffled
        # Two: a batch that crosses the end of an epoch reads from both.
        self._permutation = lru_cache(maxsize=2)(self._shuffle)

    def __getitem__(self, draw: int) -> int:
        if draw < 0:
            raise IndexError(f"draws count from 0, got {draw}")
        epoch, position = divmod(draw, self.num_prompts)
        if not self.shuffled:
            return position
        return self._permutation(epoch)[position]

    def _shuffle(self, epoch: int) -> list[int]:
        order = list(range(self.num_prompts))
        Random(f"{self.seed}-{epoch}").shuffle(order)
        return order


def group_seed(run_seed: int, draw: int, completions: int) -> int:
    """First of the streams seed .. seed + completions - 1 that a group's completions draw from.

    Streams of different draws of a run never overlap: draw d owns the `completions` numbers from
    `d * completions` on. The run seed stands in the high 32 bits, so seeds differ between runs; and
    it shifts the low 32, since torch's CPU generator reads no others. Below 2**63 (vLLM's limit),
    as run_seed < 2**31. Raises `ValueError` after 2**31 completions.
    """
    if not 0 <= run_seed < 2**31 or draw < 0 or completions < 1:
        raise ValueError(f"no streams for run seed {run_seed}, draw {draw}, {completions=}")
    first = draw * completions
    if first + completions > _STREAMS:
        raise ValueError(f"draw {draw} of {completions} passes a run's {_STREAMS} random streams")
    return (run_seed << 32) + run_seed * _ODD % _STREAMS + first
