"""How buckets get from rank 0 of a group to all others: through memory that all of them see, or by
broadcasts over gloo. Torch only.

On one machine all map a piece of rank 0's memory, which no file system knows and which is gone with
the last of them. A bucket is then written once, read by every engine where it lies, and gloo only
says how far all are. Where one of them cannot map it (it is on another machine, or in a container
of its own), all get broadcasts.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo

from medrl.actors.wire import collective, open_gloo

SLOTS = 4
"""Buckets in memory at a time. Rank 0 fills a slot once it has passed on the bucket two before; the
others are then done with the one four before, for each asks for a bucket while it works on the
last."""

_NAME = "medrl-buckets"
_OFFER_BYTES = 512


class Lane:
    """An open group. The others get what rank 0 passes on, in its order.

    Whatever takes longer than `timeout_s` raises `RuntimeError`: joining, and passing on."""

    def __init__(
        self,
        address: str,
        port: int,
        rank: int,
        world_size: int,
        timeout_s: float,
        *,
        slot_bytes: int = 0,  # of the largest bucket; rank 0 says
        share_memory: bool = True,  # where all can; rank 0 says
    ) -> None:
        self._group: ProcessGroupGloo | None = open_gloo(address, port, rank, world_size, timeout_s)
        size = SLOTS * slot_bytes
        offering = _offering(size) if share_memory and not rank else nullcontext(_Offer(size=size))
        try:
            with offering as offer:
                offer, memory = self._agree(offer, world_size)
        except BaseException:
            self.close()  # else the others would wait until their deadline
            raise
        self.shares_memory = memory is not None
        if memory is None:
            memory = torch.empty(offer.size, dtype=torch.uint8)
        self._slots = memory.view(SLOTS, -1)

    def slot(self, number: int, size: int) -> Tensor:
        """[size] uint8: where bucket `number` lies on this rank."""
        return self._slots[number % SLOTS, :size]

    def pass_on(self, slot: Tensor) -> None:
        """Return once `slot` holds here what it holds on rank 0. All ranks must call."""
        if self.shares_memory:
            collective(self._group, "barrier")
        else:
            collective(self._group, "broadcast", slot, 0)

    def close(self) -> None:
        if self._group is not None:
            self._group.shutdown()
            self._group = None  # this, not the shutdown, closes the connections

    def _agree(self, offer: _Offer, world_size: int) -> tuple[_Offer, Tensor | None]:
        """Rank 0's offer, and the memory itself if all have mapped it."""
        told = offer.written()
        collective(self._group, "broadcast", told, 0)
        offer = _Offer.read(told)
        memory = offer.mapped()
        mapped = torch.tensor([int(memory is not None)])
        collective(self._group, "allreduce", mapped)
        return offer, memory if mapped.item() == world_size else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Offer:
    """Memory of rank 0's, as told to the others."""

    size: int  # bytes
    path: str = ""  # of its file descriptor; empty: it is not to be shared
    token: str = ""  # what it begins with: another machine may have something else at that path

    def written(self) -> Tensor:
        text = json.dumps(asdict(self)).ljust(_OFFER_BYTES)
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    @classmethod
    def read(cls, told: Tensor) -> _Offer:
        return cls(**json.loads(told.numpy().tobytes()))

    def mapped(self) -> Tensor | None:
        """[size] uint8; None where this process cannot map it."""
        try:
            if _NAME not in os.readlink(self.path):
                return None
            memory = torch.from_file(self.path, shared=True, size=self.size, dtype=torch.uint8)
        except (OSError, RuntimeError):
            return None
        token = self.token.encode()
        return memory if memory[: len(token)].numpy().tobytes() == token else None


@contextmanager
def _offering(size: int) -> Iterator[_Offer]:
    """New memory of this process. Others can map it in the block; what is mapped stays."""
    file = os.memfd_create(_NAME)
    try:
        token = secrets.token_hex()
        os.ftruncate(file, size)
        os.pwrite(file, token.encode(), 0)
        yield _Offer(size=size, path=f"/proc/{os.getpid()}/fd/{file}", token=token)
    finally:
        os.close(file)
