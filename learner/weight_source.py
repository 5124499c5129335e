"""The learner's weights as a sync sends them: whole tensors, many gathered at a time.

It has the two channels of vLLM's `WeightSource`: `metadata` says what `buckets` will yield, element
for element, without moving anything. Torch only; DeepSpeed's gather is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import chain, groupby
from typing import Protocol

import torch
from torch.nn import Module, Parameter

from medrl.actors.common_memory import Memory
from medrl.actors.types import WeightMeta
from medrl.actors.wire import lie_packed, padded, split_buckets, starts

Gather = Callable[[list[Parameter]], AbstractContextManager[object]]


class WeightSource(Protocol):
    """What a sender sends. Iterating is a collective where it gathers: every rank does."""

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
        not, and on ranks other than 0."""
        ...


class ModuleSource:
    """A `WeightSource` over a module.

    `gather` makes parameters whole for a block, a bucket of them in one call. The default is for
    whole parameters; ZeRO 3 has another (`gathering`).
    """

    def __init__(self, module: Module, gather: Gather | None = None) -> None:
        self._parameters = side_by_side(module.named_parameters())  # a tied tensor is listed once
        self.gather: Gather = gather or (lambda parameters: nullcontext())
        self._memory: Memory | None = None

    def lay_out(self) -> None:
        """Move the parameters, on a CPU, to memory that engines of the same machine can map, and
        have them sent in the order in which they lie there: what engines read is then what the
        optimiser writes, and no sync copies it. Storages move as they are, so whoever else looks
        into one (DeepSpeed, from ZeRO 1 on, once it has its own) goes on to. Where one is more, or
        other, than packed parameters, all stay where they are and syncs copy: DeepSpeed pads its
        own for the number of ranks, which tells at 3, 5, 6 and 7. So they do where there is no
        such memory."""
        storages: dict[int, list[tuple[str, Parameter]]] = {}
        for name, parameter in sorted(self._parameters.items(), key=_storage_offset):
            storages.setdefault(parameter.untyped_storage()._cdata, []).append((name, parameter))
        if not all(_fill_a_storage([p for _, p in named]) for named in storages.values()):
            return
        moving = [named[0][1].untyped_storage() for named in storages.values()]
        *begins, size = starts(storage.nbytes() for storage in moving)
        with suppress(OSError, RuntimeError):
            self._memory = Memory(size)
        if self._memory is None:
            return
        for storage, begin in zip(moving, begins, strict=True):
            place = self._memory.part(begin, storage.nbytes()).untyped_storage()
            place.copy_(storage)
            storage._swap_data_ptr_(place)  # type: ignore[attr-defined]
        self._parameters = dict(chain.from_iterable(storages.values()))

    def memory(self) -> Memory | None:
        memory = self._memory
        if memory and not lie_packed([*self._parameters.values()], memory.part(0, 1).data_ptr()):
            self._memory = None
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


def _fill_a_storage(parameters: Sequence[Parameter]) -> bool:
    """Whether `parameters`, of one storage and by where they begin, fill it as they do a bucket."""
    storage = parameters[0].untyped_storage()
    end = starts(parameter.nbytes for parameter in parameters)[-1]
    return lie_packed(parameters, storage.data_ptr()) and padded(storage.nbytes()) == end


def _shape(parameter: Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
