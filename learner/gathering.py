"""Whole parameters where ZeRO-3 has them in parts: on rank 0 alone, which is who sends and writes.

DeepSpeed's `GatheredParameters` makes them whole on every rank, so each rank's bytes travel to all
the others. A sync needs them once. Ranks of one machine do without travelling: each writes its part
of a parameter into memory that rank 0 sees, beside the others' (`actors.common_memory`). Engines of
that machine read them there too, unless adapters are to be merged into them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import Module, Parameter

from medrl.actors.common_memory import Memory, agree
from medrl.actors.types import WeightMeta
from medrl.actors.wire import split_buckets, starts
from medrl.learner.weight_source import ModuleSource


class WholeOnFirst:
    """A `weight_source.Gather` for parameters that DeepSpeed has partitioned over all ranks.

    In the block rank 0 has the `data` of these, which nobody may change; on other ranks they stay
    as they are. A collective. On CPUs of one machine memory for all of them stays mapped, once for
    all ranks.
    """

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        """A collective. `parameters`: all that will be asked for, in the order in which they are to
        lie."""
        partitioned: list[Any] = list(parameters)
        *begins, size = starts(one.ds_numel * one.element_size() for one in partitioned)
        self.memory: Memory | None = None
        """Rank 0's, in which what was gathered lies as packed buckets do; None on other ranks, and
        where ranks do not share memory."""
        self._places: Mapping[Parameter, Tensor] = {}  # its bytes, in memory that all ranks see
        self.shares_memory = False
        if any(one.ds_tensor.device.type != "cpu" for one in partitioned):
            return
        rank, world = distributed.get_rank(), distributed.get_world_size()
        if not rank:
            with suppress(OSError, RuntimeError):
                self.memory = Memory(size)
        common = agree(
            *(distributed.group.WORLD, rank, world, size),
            memory=self.memory,
            share=self.memory is not None,
        ).memory
        if common is None:
            self.memory = None
            return
        self.shares_memory = True
        self._places = {
            one: common[begin:][: one.ds_numel * one.element_size()]
            for one, begin in zip(partitioned, begins, strict=True)
        }

    @contextmanager
    def __call__(self, parameters: list[Parameter]) -> Iterator[None]:
        partitioned: list[Any] = list(parameters)
        parts = [one.ds_tensor.data.flatten().view(torch.uint8) for one in partitioned]
        before = [one.data for one in partitioned]
        wholes = self._written(partitioned, parts) if self.shares_memory else _received(parts)
        try:
            for one, whole in zip(partitioned, wholes, strict=False):
                one.data = whole.view(one.dtype)[: one.ds_numel].view(one.ds_shape)
            yield
        finally:
            for one, data in zip(partitioned, before, strict=True):
                one.data = data

    def _written(self, parameters: Iterable[Parameter], parts: Iterable[Tensor]) -> list[Tensor]:
        """All bytes of each, where it lies; on ranks other than 0 none. A rank may be here again
        while rank 0 still reads: until all ranks have ended a pass none changes a weight, so it
        writes what is there."""
        rank = distributed.get_rank()
        places = [self._places[one] for one in parameters]
        for place, part in zip(places, parts, strict=True):
            mine = place[rank * part.numel() :][: part.numel()]
            mine.copy_(part[: mine.numel()])  # the last of them are padding of DeepSpeed's
        distributed.barrier()
        return [] if rank else places


class PartitionedSource(ModuleSource):
    """A `WeightSource` over a module under ZeRO 3."""

    def __init__(self, module: Module) -> None:
        super().__init__(module)
        self._whole = WholeOnFirst(self._parameters.values())
        self.gather = self._whole

    def memory(self) -> Memory | None:
        return self._whole.memory

    def buckets(self, bucket_bytes: int) -> Iterator[tuple[Sequence[WeightMeta], Iterable[Tensor]]]:
        """Where ranks share memory all are gathered at once, which takes each rank as long as
        copying its part: how rank 0 cuts buckets is then its own affair."""
        if not self._whole.shares_memory:
            yield from super().buckets(bucket_bytes)
            return
        with self._whole(list(self._parameters.values())):
            for bucket in split_buckets(self.metadata(), bucket_bytes):
                yield bucket, [self._parameters[meta.name].data for meta in bucket]


def _received(parts: list[Tensor]) -> list[Tensor]:
    mine = torch.cat(parts)
    first = distributed.get_rank() == 0
    ranks = range(distributed.get_world_size())
    everyones = [torch.empty_like(mine) for _ in ranks] if first else None
    distributed.gather(mine, everyones, dst=0)
    sizes = [part.numel() for part in parts]
    split = (torch.split(one, sizes) for one in everyones or ())
    return [torch.cat(parts_of_one) for parts_of_one in zip(*split, strict=True)]
