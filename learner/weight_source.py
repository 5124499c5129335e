"""The learner's weights as a sync sends them: whole tensors, many gathered at a time.

It has the two channels of vLLM's `WeightSource`: `metadata` says what `buckets` will yield, element
for element, without moving anything. Torch only; DeepSpeed's gather is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch.nn import Module, Parameter

from medrl.actors.types import WeightMeta
from medrl.actors.wire import split_buckets

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


class ModuleSource:
    """A `WeightSource` over a module under any ZeRO stage.

    `gather` makes parameters whole for a block, under ZeRO 3 (`gathering.WholeOnFirst`), a bucket
    of them in one call. The default is for whole parameters.
    """

    def __init__(self, module: Module, gather: Gather | None = None) -> None:
        self._parameters = dict(module.named_parameters())  # a tied tensor is listed once
        self.gather: Gather = gather or (lambda parameters: nullcontext())

    def metadata(self) -> tuple[WeightMeta, ...]:
        return tuple(
            WeightMeta(
                name=name,
                dtype=str(parameter.dtype).removeprefix("torch."),
                shape=tuple(getattr(parameter, "ds_shape", parameter.shape)),
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
