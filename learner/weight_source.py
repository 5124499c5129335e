"""The learner's weights as a sync sends them: whole tensors, many gathered at a time.

It has the two channels of vLLM's `WeightSource`: `metadata` says what `buckets` will yield, element
for element, without moving anything. Torch only; DeepSpeed's gather is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property
from itertools import groupby
from typing import Protocol

import torch
from torch.nn import Module, Parameter

from medrl.actors.common_memory import Memory
from medrl.actors.types import WeightMeta
from medrl.actors.wire import buffer_bytes, num_bytes, padded, split_buckets

Gather = Callable[[list[Parameter]], AbstractContextManager[object]]


class WeightSource(Protocol):
    """What a sender sends. Iterating is a collective: every rank does, in the same order."""

    def metadata(self) -> tuple[WeightMeta, ...]:
        """Every tensor, in order; no collective."""
        ...

    def buckets(
        self, bucket_bytes: int
    ) -> Iterator[tuple[Sequence[WeightMeta], Iterable[torch.Tensor]]]:
        """The same tensors, a bucket at a time; valid only until the next bucket is asked for.
        Whole where they are sent from: on other ranks they may be empty."""
        ...

    def memory(self) -> Memory | None:
        """In which the tensors that `buckets` yields lie, as packed buckets do; None where they do
        not, and on other ranks than 0. A collective."""
        ...


class ModuleSource:
    """A `WeightSource` over a module under any ZeRO stage.

    `gather` makes parameters whole for a block, under ZeRO 3 (`gathering.WholeOnFirst`), a bucket
    of them in one call. The default is for whole parameters.
    """

    def __init__(self, module: Module, gather: Gather | None = None) -> None:
        self._parameters = side_by_side(module.named_parameters())  # a tied tensor is listed once
        self.gather: Gather = gather or (lambda parameters: nullcontext())
        self._memory: Memory | None = None

    def lay_out(self) -> None:
        """Move the parameters, on a CPU, to memory that engines of the same machine can map: what
        they read is then what the optimiser writes, and no sync copies it. Where there is no such
        memory, or other code moves them on, syncs copy as ever."""
        if not all(parameter.is_contiguous() for parameter in self._parameters.values()):
            return  # other ranks have them as they are, and are sent rank 0's bytes
        with suppress(OSError, RuntimeError):
            self._memory = Memory(buffer_bytes(self.metadata()))
        for parameter, place in self._places():
            parameter.data = place.copy_(parameter.data)

    def memory(self) -> Memory | None:
        if any(parameter.data_ptr() != place.data_ptr() for parameter, place in self._places()):
            self._memory = None
        return self._memory

    def _places(self) -> Iterator[tuple[Parameter, torch.Tensor]]:
        """Each parameter, and where it belongs in the memory: a tensor with a storage of its own.
        None where there is no such memory."""
        memory, start = self._memory, 0
        if memory is None:
            return
        for meta in self.metadata():
            part = memory.part(start, num_bytes(meta))
            place = part.view(getattr(torch, meta.dtype)).view(meta.shape)
            yield self._parameters[meta.name], place
            start += padded(num_bytes(meta))

    def metadata(self) -> tuple[WeightMeta, ...]:
        return self._metadata

    @cached_property
    def _metadata(self) -> tuple[WeightMeta, ...]:
        return tuple(
            WeightMeta(
                name=name,
                dtype=str(parameter.dtype).removeprefix("torch."),
                shape=_shape(parameter),
            )
            for name, parameter in self._parameters.items()
        )

    def buckets(
        self, bucket_bytes: int
    ) -> Iterator[tuple[Sequence[WeightMeta], Iterable[torch.Tensor]]]:
        for bucket in split_buckets(self.metadata(), bucket_bytes):
            parameters = [self._parameters[meta.name] for meta in bucket]
            with self.gather(parameters):
                yield bucket, [parameter.data for parameter in parameters]


def side_by_side(named: Iterable[tuple[str, Parameter]]) -> dict[str, Parameter]:
    """As they come, but in each block (attention, MLP) weights before biases: what an engine joins,
    such as queries, keys and values, is then already one piece."""
    blocks = groupby(named, lambda one: one[0].rsplit(".", 2)[0])
    return {
        name: parameter
        for _, block in blocks
        for name, parameter in sorted(block, key=lambda one: len(_shape(one[1])) < 2)
    }


def _shape(parameter: Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
