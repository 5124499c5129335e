"""Whole parameters where ZeRO-3 has them in parts: on rank 0 alone, which is who sends and writes.

DeepSpeed's `GatheredParameters` makes them whole on every rank, so each rank's bytes travel to all
the others. A sync needs them once. Ranks of one machine do without travelling: each writes its part
of a parameter into memory that rank 0 sees, beside the others' (`actors.common_memory`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import Parameter

from medrl.actors.common_memory import agree
from medrl.actors.wire import padded

_SLOTS = 2  # the other ranks write one while rank 0 reads the other


class WholeOnFirst:
    """A `weight_source.Gather` for parameters that DeepSpeed has partitioned over all ranks.

    In the block rank 0 has the `data` of these, which nobody may change; on other ranks they stay
    as they are. A collective. On CPUs two buckets of memory, of the largest so far, stay mapped.
    """

    def __init__(self) -> None:
        self._slots: Tensor | None = None  # [_SLOTS, bytes] uint8
        self._shares = True  # until one rank could not
        self._calls = 0

    @contextmanager
    def __call__(self, parameters: list[Parameter]) -> Iterator[None]:
        partitioned: list[Any] = list(parameters)
        parts = [one.ds_tensor.data.flatten().view(torch.uint8) for one in partitioned]
        before = [one.data for one in partitioned]
        wholes = self._whole(parts)
        try:
            for one, whole in zip(partitioned, wholes, strict=False):
                one.data = whole.view(one.dtype)[: one.ds_numel].view(one.ds_shape)
            yield
        finally:
            for one, data in zip(partitioned, before, strict=True):
                one.data = data

    def _whole(self, parts: list[Tensor]) -> list[Tensor]:
        """All ranks' bytes of each part, one after the other; on ranks other than 0 none."""
        world, rank = distributed.get_world_size(), distributed.get_rank()
        sizes = [world * part.numel() for part in parts]
        *starts, total = accumulate(map(padded, sizes), initial=0)
        slot = self._slot(total, parts[0].device)
        if slot is None:
            return _received(parts)
        places = [slot[start:][:size] for start, size in zip(starts, sizes, strict=True)]
        for place, part in zip(places, parts, strict=True):
            place.view(world, -1)[rank].copy_(part)
        distributed.barrier()
        return [] if rank else places

    def _slot(self, size: int, device: torch.device) -> Tensor | None:
        """Of at least `size` bytes; None where ranks have no memory in common. Rank 0 is done with
        one when it comes to the barrier of the next, and no rank writes there before."""
        self._shares = self._shares and device.type == "cpu"
        if self._shares and (self._slots is None or self._slots.shape[1] < size):
            self._slots = None  # gone with the last bucket's tensors
            memory = agree(
                distributed.group.WORLD,
                distributed.get_rank(),
                distributed.get_world_size(),
                _SLOTS * size,
            ).memory
            self._shares = memory is not None
            if memory is not None:
                self._slots = memory.view(_SLOTS, -1)
        self._calls += 1
        return None if self._slots is None else self._slots[self._calls % _SLOTS]


def _received(parts: list[Tensor]) -> list[Tensor]:
    mine = torch.cat(parts)
    first = distributed.get_rank() == 0
    ranks = range(distributed.get_world_size())
    everyones = [torch.empty_like(mine) for _ in ranks] if first else None
    distributed.gather(mine, everyones, dst=0)
    sizes = [part.numel() for part in parts]
    split = (torch.split(one, sizes) for one in everyones or ())
    return [torch.cat(parts_of_one) for parts_of_one in zip(*split, strict=True)]
