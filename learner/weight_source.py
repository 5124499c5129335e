"""The learner's weights as a sync sends them: whole tensors, many gathered at a time.

It has the two channels of vLLM's `WeightSource`: `metadata` says what `buckets` will yield, element
for element, without moving anything. Torch only; DeepSpeed's gather is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import groupby
from typing import Protocol

import torch
from torch.nn import Module, Parameter

from medrl.actors.common_memory import Memory
from medrl.actors.types import WeightMeta
from medrl.actors.wire import padded, split_buckets

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
        """Move the parameters, on a CPU, to memory that engines of the same machine can map, and
        have them sent in the order in which they lie there: what engines read is then what the
        optimiser writes, and no sync copies it. Storages move as they are, so whoever else looks
        into one (DeepSpeed, from ZeRO 1 on) goes on to. Where one is more, or other, than packed
        parameters, or there is no such memory, all stay where they are and syncs copy."""
        storages: dict[int, dict[str, Parameter]] = {}
        for name, parameter in sorted(self._parameters.items(), key=_storage_offset):
            storages.setdefault(parameter.untyped_storage().data_ptr(), {})[name] = parameter
        if not all(_is_packed(parameters.values()) for parameters in storages.values()):
            return
        with suppress(OSError, RuntimeError):
            self._memory = Memory(sum(padded(p.nbytes) for p in self._parameters.values()))
        if self._memory is None:
            return
        start = 0
        for parameters in storages.values():
            storage = next(iter(parameters.values())).untyped_storage()
            place = self._memory.part(start, storage.nbytes())
            place.untyped_storage().copy_(storage)
            storage._swap_data_ptr_(place.untyped_storage())  # type: ignore[attr-defined]
            start += padded(storage.nbytes())
        self._parameters = {n: p for parameters in storages.values() for n, p in parameters.items()}

    def memory(self) -> Memory | None:
        if self._memory is not None:
            start = self._memory.part(0, 1).data_ptr()
            for parameter in self._parameters.values():
                if parameter.data_ptr() != start:
                    self._memory = None
                    break
                start += padded(parameter.nbytes)
        return self._memory

    def metadata(self) -> tuple[WeightMeta, ...]:
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


def _storage_offset(named: tuple[str, Parameter]) -> int:
    return int(named[1].storage_offset())


def _is_packed(parameters: Iterable[Parameter]) -> bool:
    """Whether `parameters`, by where they begin, fill their storage as they would a bucket."""
    end = size = 0
    for parameter in parameters:
        begin = parameter.storage_offset() * parameter.itemsize
        if begin != end or not parameter.is_contiguous():
            return False
        end += padded(parameter.nbytes)
        size = parameter.untyped_storage().nbytes()
    return padded(size) == end


def _shape(parameter: Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
