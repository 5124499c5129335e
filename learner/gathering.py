"""Whole parameters where ZeRO-3 has them in parts: on rank 0 alone, which is who sends and writes.

DeepSpeed's `GatheredParameters` makes them whole on every rank, so each rank's bytes travel to all
the others. A sync needs them once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import Parameter


@contextmanager
def whole_on_first(parameters: list[Parameter]) -> Iterator[None]:
    """In the block rank 0 has the `data` of these, which nobody may change; on other ranks they
    stay as they are. A collective, of parameters that DeepSpeed has partitioned over all ranks."""
    partitioned: list[Any] = list(parameters)
    parts = [one.ds_tensor.data.flatten().view(torch.uint8) for one in partitioned]
    before = [one.data for one in partitioned]
    try:
        pieces: tuple[Tensor, ...] = ()
        for one, pieces in zip(partitioned, _received(parts), strict=False):
            padded = torch.cat(pieces).view(one.dtype)
            one.data = padded[: one.ds_numel].view(one.ds_shape)
        del pieces  # a view of it keeps all that a rank sent
        yield
    finally:
        for one, data in zip(partitioned, before, strict=True):
            one.data = data


def _received(parts: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """All ranks' bytes of each part, in the order of ranks; on ranks other than 0 nothing."""
    mine = torch.cat(parts)
    first = distributed.get_rank() == 0
    ranks = range(distributed.get_world_size())
    everyones = [torch.empty_like(mine) for _ in ranks] if first else None
    distributed.gather(mine, everyones, dst=0)
    sizes = [part.numel() for part in parts]
    return list(zip(*(torch.split(one, sizes) for one in everyones or ()), strict=True))
