"""How buckets get from rank 0 of a group to all others: through memory that all of them see, or by
broadcasts over gloo. Torch only.

On one machine all map a piece of rank 0's memory (`common_memory`): that in which its weights lie,
or slots that it fills with one bucket after the other. A bucket is then read by every engine where
it lies, and gloo only says how far all are. Where one of them cannot map it (it is on another
machine, or in a container of its own), all get broadcasts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo

from medrl.actors.common_memory import Memory, agree
from medrl.actors.wire import collective, open_gloo

SLOTS = 5
"""Buckets in memory at a time. Rank 0 fills a slot once it has passed on the bucket two before. The
others have then asked for that one, so they have begun with the one before it, work perhaps on the
one before that still, and are done with the one that lies in the slot."""

_BESIDE = 2  # threads: gloo's, and one of the other end's


class Lane:
    """An open group. The others get what rank 0 passes on, in its order. Rank 0 may begin to send
    anew, or the learner change its weights, once all others are done with what they got last: where
    memory is common that writes there.

    Whatever takes longer than `timeout_s` raises `RuntimeError`: each step of joining, and passing
    on."""

    def __init__(
        self,
        address: str,
        port: int,
        rank: int,
        world_size: int,
        timeout_s: float,
        bucket_bytes: int,
        *,
        slot_bytes: int = 0,  # of the largest bucket; rank 0 says
        weights: Memory | None = None,  # of rank 0: where all buckets lie, one after the other
        share_memory: bool = True,  # where all can; rank 0 says
    ) -> None:
        self._group: ProcessGroupGloo | None = open_gloo(address, port, rank, world_size, timeout_s)
        try:
            agreed = agree(
                self._group,
                rank,
                world_size,
                weights.size if weights else SLOTS * slot_bytes,
                memory=weights,
                share=share_memory,
                note={"slot_bytes": slot_bytes, "has_all": weights is not None},
                writable=False,
            )
        except BaseException:
            self.close()  # else the others would wait until their deadline
            raise
        self._slot_bytes = agreed.note["slot_bytes"]
        self.shares_memory = agreed.memory is not None
        all_see_all = bool(agreed.note["has_all"]) and self.shares_memory
        # As all ranks are to cut buckets: what all see need not be cut.
        self.bucket_bytes = agreed.size if all_see_all else bucket_bytes
        self._has_all = all_see_all or weights is not None
        if agreed.memory is not None:
            self._memory = agreed.memory
        elif weights is not None:
            self._memory = weights.part(0, weights.size)
        else:
            self._memory = torch.empty(SLOTS * self._slot_bytes, dtype=torch.uint8)

    def slot(self, number: int, start: int, size: int) -> Tensor:
        """[size] uint8: where bucket `number` lies on this rank. `start`: bytes of those before."""
        if not self._has_all:
            start = number % SLOTS * self._slot_bytes
        return self._memory[start : start + size]

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


@contextmanager
def threads_spared() -> Iterator[None]:
    """Leave cores to the other end and to what moves: threads that compute side by side wait for
    each other, so one that finds no core makes copying and packing twice as slow, or ten times."""
    threads = torch.get_num_threads()
    # vLLM makes `torch.set_num_threads` do nothing, for it would undo the binding to cores.
    torch._C.set_num_threads(max(1, threads - _BESIDE))
    try:
        yield
    finally:
        torch._C.set_num_threads(threads)
