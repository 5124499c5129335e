"""Memory that all processes of a group map, where they are on one machine. Torch only.

No file system knows it, and it is gone with the last of them.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from weakref import finalize

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ProcessGroupGloo

from medrl.actors.wire import collective

NAME = "medrl-weights"
_OFFER_BYTES = 512


class Memory:
    """New memory of this process, zeros. Others can map it until it is closed; what is mapped, here
    too, stays. Raises `OSError` or `RuntimeError` where there can be none: it may be forbidden, and
    a limit on the size of files counts here too."""

    def __init__(self, size: int) -> None:
        self.size = size  # bytes
        file = os.memfd_create(NAME)
        self.close = finalize(self, os.close, file)
        path = f"/proc/{os.getpid()}/fd/{file}"
        self.offer = Offer(size=size, path=path, token=secrets.token_hex())
        os.ftruncate(file, size + len(self.offer.token))
        os.pwrite(file, self.offer.token.encode(), size)
        self._mapped = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)

    def part(self, start: int, size: int) -> Tensor:
        """[size] uint8 from byte `start` on; has a storage of its own, to be saved by itself."""
        return torch.from_numpy(self._mapped.numpy()[start : start + size])


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """What a group agreed on."""

    size: int  # bytes, as rank 0 said
    note: Mapping[str, int]  # likewise
    memory: Tensor | None  # [size] uint8, the same for all; None: one of them cannot map it


def agree(
    group: ProcessGroup | ProcessGroupGloo | None,
    rank: int,
    world_size: int,
    size: int,
    *,
    memory: Memory | None = None,
    share: bool = True,
    note: Mapping[str, int] | None = None,
    writable: bool = True,
) -> Agreed:
    """Map `size` bytes of rank 0's, new ones or those of its `memory`, unless it does not `share`.
    All this, and the `note`, is rank 0's to say. Not `writable`: what another rank writes there it
    alone sees, and what rank 0 writes to that page it sees no more. A collective. Raises
    `RuntimeError` past the group's timeout."""
    with ExitStack() as made:
        offered = memory
        if not rank and share and memory is None:
            with suppress(OSError, RuntimeError):
                offered = Memory(size)
                made.callback(offered.close)
        offer = offered.offer if offered is not None and share else Offer(size=size)
        told = replace(offer, note=note or {}).written()
        collective(group, "broadcast", told, 0)
        offer = Offer.read(told)
        mine = memory if share else None
        seen = mine.part(0, size) if mine else offer.mapped(writable=writable or not rank)
        mapped = torch.tensor([int(seen is not None)])
        collective(group, "allreduce", mapped)
    everywhere = mapped.item() == world_size
    return Agreed(size=offer.size, note=offer.note, memory=seen if everywhere else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Memory of rank 0's, as told to the others."""

    size: int  # bytes
    path: str = ""  # of its file descriptor; empty: it is not to be shared
    token: str = ""  # what follows it: another machine may have something else at that path
    note: Mapping[str, int] = field(default_factory=dict)  # to the group

    def written(self) -> Tensor:
        text = json.dumps(asdict(self)).ljust(_OFFER_BYTES)
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    @classmethod
    def read(cls, told: Tensor) -> Offer:
        return cls(**json.loads(told.numpy().tobytes()))

    def mapped(self, *, writable: bool = True) -> Tensor | None:
        """[size] uint8; None where this process cannot map it."""
        token = self.token.encode()
        try:
            if NAME not in os.readlink(self.path):
                return None
            size = self.size + len(token)
            memory = torch.from_file(self.path, shared=writable, size=size, dtype=torch.uint8)
        except (OSError, RuntimeError):
            return None
        return memory[: self.size] if memory[self.size :].numpy().tobytes() == token else None
