"""Bytes over gloo and nothing else."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch
from torch.distributed import ProcessGroupGloo

from medrl.actors.wire import collective, digest, open_gloo
from medrl.bench.facts import Count, Fact
from medrl.cluster.loopback import ADDRESS

_TIMEOUT_S = 120.0  # of joining, and of any one collective
PIECE_BYTES = 64 * 2**20  # at a time, whatever ours sends: faster than in pieces of 16 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A broadcast, as one peer saw it."""

    seconds: float  # from when all were ready until all had everything
    digest: str  # of what was sent, or arrived


class Peer:
    """Sends (rank 0) or receives one contiguous buffer, in pieces. Both calls are collectives."""

    def __init__(self, num_bytes: int, piece_bytes: int = PIECE_BYTES) -> None:
        self._buffer = torch.zeros(num_bytes, dtype=torch.uint8)
        self._piece_bytes = piece_bytes
        self._group: ProcessGroupGloo | None = None
        self._rank = 0

    def join(self, port: int, rank: int, world: int) -> None:
        self._group, self._rank = open_gloo(ADDRESS, port, rank, world, _TIMEOUT_S), rank

    def move(self) -> Seen:
        """Move all bytes, each another than the time before."""
        if self._rank == 0:
            self._buffer += 1
        collective(self._group, "barrier")
        began = time.perf_counter()
        for piece in torch.split(self._buffer, self._piece_bytes):
            collective(self._group, "broadcast", piece, 0)
        # A sender is done when its sockets have taken the last piece, not when that arrived.
        collective(self._group, "barrier")
        seconds = time.perf_counter() - began
        return Seen(seconds=seconds, digest=digest(self._buffer))


def free_port() -> int:
    """Of this machine; nobody listens there now."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        port: int = probe.getsockname()[1]
        return port


class Broadcasts:
    """Moves the same number of bytes again and again, and knows what arrived."""

    def __init__(self, peers: Sequence[Any]) -> None:
        self._peers = peers
        self._seen: list[Sequence[Seen]] = []  # by run, the sender first

    async def once(self) -> float:
        """Seconds, by the sender's clock."""
        self._seen.append(await asyncio.gather(*(peer.move.remote() for peer in self._peers)))
        return self._seen[-1][0].seconds

    def facts(self) -> tuple[Fact, ...]:
        """That other bytes were sent each time, and were what arrived."""
        return facts(self._seen)


def facts(seen: Sequence[Sequence[Seen]]) -> tuple[Fact, ...]:
    """Of runs, each as all its peers saw it, the sender first."""
    sent = {sender.digest for sender, *_ in seen}
    arrived = [one.digest == sender.digest for sender, *others in seen for one in others]
    return (
        Count(what="different buffers broadcast", asked=len(seen), done=len(sent)),
        Count(what="broadcast buffers that arrived", asked=len(arrived), done=sum(arrived)),
    )


@asynccontextmanager
async def broadcasts(
    num_bytes: int, receivers: int, options: Mapping[str, Any]
) -> AsyncIterator[Broadcasts]:
    """Peers for the block: Ray actors with `options`, for they are to live as engines do."""
    remote = ray.remote(Peer).options(**options)
    peers = [remote.remote(num_bytes) for _ in range(1 + receivers)]
    try:
        port = free_port()
        joins = (peer.join.remote(port, rank, len(peers)) for rank, peer in enumerate(peers))
        await asyncio.gather(*joins)
        yield Broadcasts(peers)
    finally:
        for peer in peers:
            ray.kill(peer)
