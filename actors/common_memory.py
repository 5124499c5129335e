"""Memory that all processes of a group map, where they are on one machine. Torch only.

No file system knows it, and it is gone with the last of them.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ProcessGroupGloo

from medrl.actors.wire import collective

NAME = "medrl-buckets"
_OFFER_BYTES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonMemory:
    """What a group agreed on."""

    size: int  # bytes, as rank 0 said
    memory: Tensor | None  # [size] uint8, the same for all; None: one of them cannot map it


def agree(
    group: ProcessGroup | ProcessGroupGloo | None,
    rank: int,
    world_size: int,
    size: int,
    *,
    share: bool = True,
) -> CommonMemory:
    """Map `size` bytes of rank 0's, unless it does not `share`; both are rank 0's to say.
    A collective. Raises `RuntimeError` past the group's timeout."""
    offering = _offering(size) if share and not rank else nullcontext(Offer(size=size))
    with offering as offer:
        told = offer.written()
        collective(group, "broadcast", told, 0)
        offer = Offer.read(told)
        memory = offer.mapped()
        mapped = torch.tensor([int(memory is not None)])
        collective(group, "allreduce", mapped)
    return CommonMemory(size=offer.size, memory=memory if mapped.item() == world_size else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Memory of rank 0's, as told to the others."""

    size: int  # bytes
    path: str = ""  # of its file descriptor; empty: it is not to be shared
    token: str = ""  # what it begins with: another machine may have something else at that path

    def written(self) -> Tensor:
        text = json.dumps(asdict(self)).ljust(_OFFER_BYTES)
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    @classmethod
    def read(cls, told: Tensor) -> Offer:
        return cls(**json.loads(told.numpy().tobytes()))

    def mapped(self) -> Tensor | None:
        """[size] uint8; None where this process cannot map it."""
        try:
            if NAME not in os.readlink(self.path):
                return None
            memory = torch.from_file(self.path, shared=True, size=self.size, dtype=torch.uint8)
        except (OSError, RuntimeError):
            return None
        token = self.token.encode()
        return memory if memory[: len(token)].numpy().tobytes() == token else None


@contextmanager
def _offering(size: int) -> Iterator[Offer]:
    """New memory of this process. Others can map it in the block; what is mapped stays."""
    token = secrets.token_hex()
    with ExitStack() as open_files:
        try:
            file = os.memfd_create(NAME)
            open_files.callback(os.close, file)
            os.ftruncate(file, size)
            os.pwrite(file, token.encode(), 0)
            offer = Offer(size=size, path=f"/proc/{os.getpid()}/fd/{file}", token=token)
        except OSError:  # it may be forbidden, and a limit on the size of files counts here too
            offer = Offer(size=size)
        yield offer
