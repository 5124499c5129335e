"""What rank 0 of a lane writes, the others read: in its memory or in their own."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from medrl.actors import common_memory
from medrl.actors.common_memory import Memory
from medrl.actors.lane import SLOTS, Lane, threads_spared
from medrl.configs.errors import WeightSyncError

SIZE = 4096  # bytes of a bucket
RECEIVERS = 2


def lanes(
    share_memory: bool = True, timeout_s: float = 10.0, weights: Memory | None = None
) -> list[Lane]:
    """Joined, the sender first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ThreadPoolExecutor(1 + RECEIVERS) as threads:
        return list(
            threads.map(
                lambda rank: Lane(
                    "127.0.0.1",
                    port,
                    rank,
                    1 + RECEIVERS,
                    timeout_s,
                    SIZE,
                    slot_bytes=0 if rank else SIZE,
                    weights=None if rank else weights,
                    share_memory=share_memory,
                ),
                range(1 + RECEIVERS),
            )
        )


def send(sender: Lane, buckets: int) -> None:
    """As senders do: bucket k is filled when bucket k - 2 was passed on."""
    passing = []
    with ThreadPoolExecutor(1) as thread:
        for number in range(buckets):
            if number >= 2:
                passing[number - 2].result()
            slot = sender.slot(number, SIZE * number, SIZE)
            slot.fill_(number)
            passing.append(thread.submit(sender.pass_on, slot))


def receive(receiver: Lane, buckets: int, work: Callable[[int], None]) -> list[set[int]]:
    """As receivers do: the next bucket is asked for while one is worked on, and the one before may
    not be done with yet. What it held."""

    def take(number: int) -> torch.Tensor:
        slot = receiver.slot(number, SIZE * number, SIZE)
        receiver.pass_on(slot)
        return slot

    held, before = [], None
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(take, 0)
        for number in range(buckets):
            slot = coming.result()
            if number + 1 < buckets:
                coming = thread.submit(take, number + 1)
            work(number)
            if before is not None:
                held.append(set(before.tolist()))
            before = slot
    return [*held, set(before.tolist())] if before is not None else held


@pytest.mark.parametrize("share_memory", [True, False])
def test_a_bucket_stays_as_it_was_sent_until_all_are_done_with_it(share_memory: bool) -> None:
    """However slow one of them is; the sender is as fast as it can be."""
    joined, buckets = lanes(share_memory), 5 * SLOTS
    paces = (lambda number: None, lambda number: time.sleep(0.01))
    with ThreadPoolExecutor(1 + RECEIVERS) as threads:
        sending = threads.submit(send, joined[0], buckets)
        receiving = [
            threads.submit(receive, one, buckets, pace)
            for one, pace in zip(joined[1:], paces, strict=True)
        ]
        sending.result()
        for one in receiving:
            assert one.result() == [{number} for number in range(buckets)]
    assert {one.shares_memory for one in joined} == {share_memory}


def test_all_read_the_senders_own_memory() -> None:
    sender, *receivers = lanes()
    sender.slot(1, SIZE, SIZE).fill_(7)
    assert [one.slot(1, SIZE, SIZE)[0].item() for one in receivers] == [7] * RECEIVERS


BUCKETS = 2 * SLOTS


def memory() -> Memory:
    """As weights lie in it: bucket k is filled with k."""
    made = Memory(BUCKETS * SIZE)
    made.part(0, made.size).view(BUCKETS, SIZE).copy_(torch.arange(BUCKETS)[:, None])
    return made


def test_weights_that_all_see_are_one_bucket_and_are_not_copied() -> None:
    weights = memory()
    sender, *receivers = lanes(weights=weights)
    assert {one.bucket_bytes for one in (sender, *receivers)} == {weights.size}
    weights.part(3 * SIZE, SIZE).fill_(99)  # as the optimiser writes there
    assert [one.slot(3, 3 * SIZE, SIZE)[-1].item() for one in receivers] == [99] * RECEIVERS


def test_what_an_engine_writes_to_weights_it_alone_sees() -> None:
    """A loader that computed in place would train the model otherwise."""
    weights = memory()
    _, first, second = lanes(weights=weights)
    first.slot(1, SIZE, SIZE).fill_(50)
    assert weights.part(SIZE, SIZE)[0] == second.slot(1, SIZE, SIZE)[0] == 1


def test_weights_that_one_cannot_see_are_broadcast_in_buckets() -> None:
    """From where they lie, to no more memory than there is for other buckets."""
    weights = memory()
    joined = lanes(share_memory=False, weights=weights)
    assert {one.bucket_bytes for one in joined} == {SIZE}

    def all_pass_on(one: Lane) -> list[int]:
        seen = []
        for number in range(BUCKETS):
            slot = one.slot(number, number * SIZE, SIZE)
            one.pass_on(slot)
            seen.append(slot[-1].item())
        return seen

    with ThreadPoolExecutor(1 + RECEIVERS) as threads:
        assert list(threads.map(all_pass_on, joined)) == [list(range(BUCKETS))] * 3
    assert joined[0].slot(2, 2 * SIZE, SIZE).data_ptr() == weights.part(2 * SIZE, SIZE).data_ptr()


def test_parts_of_memory_are_saved_by_themselves(tmp_path: Path) -> None:
    """A checkpoint of one weight is not one of all."""
    torch.save(memory().part(SIZE, SIZE), tmp_path / "part")
    assert (tmp_path / "part").stat().st_size < 2 * SIZE


@pytest.mark.parametrize("what", ["no such file", "another file", "another's memory"])
def test_where_one_cannot_map_it_all_get_broadcasts(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container of its own, or another machine, where that path means something else."""
    mine = os.memfd_create(common_memory.NAME if what == "another's memory" else "other")
    os.ftruncate(mine, (SLOTS + 1) * SIZE)
    path = "/proc/none" if what == "no such file" else f"/proc/self/fd/{mine}"
    mapped, asked = common_memory.Offer.mapped, iter(range(10))

    def somewhere_else(offer: common_memory.Offer, **access: bool) -> torch.Tensor | None:
        here = offer if next(asked) else replace(offer, path=path)  # for the first that asks
        return mapped(here, **access)

    monkeypatch.setattr(common_memory.Offer, "mapped", somewhere_else)
    joined = lanes()
    assert not any(one.shares_memory for one in joined)
    joined[0].slot(0, 0, SIZE).fill_(5)
    with ThreadPoolExecutor(1 + RECEIVERS) as threads:
        list(threads.map(lambda one: one.pass_on(one.slot(0, 0, SIZE)), joined))
    assert [one.slot(0, 0, SIZE)[-1].item() for one in joined] == [5] * 3
    os.close(mine)


def test_where_there_is_no_such_memory_all_get_broadcasts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(file: int, size: int) -> None:
        raise OSError(errno.EFBIG, "File too large")  # as under a limit on the size of files

    monkeypatch.setattr(os, "ftruncate", refused)
    assert not any(one.shares_memory for one in lanes())


def test_no_file_stays_open() -> None:
    """The memory lives as long as one of them maps it, and nothing else keeps it."""
    joined = lanes()
    names = [os.readlink(link.path) for link in os.scandir("/proc/self/fd") if link.is_symlink()]
    assert not [name for name in names if common_memory.NAME in name]
    for one in joined:
        one.close()


def test_a_sender_that_closes_ends_the_waiting_of_the_others() -> None:
    sender, *receivers = lanes(timeout_s=60.0)
    began = time.monotonic()
    with ThreadPoolExecutor(RECEIVERS) as threads:
        waiting = [threads.submit(one.pass_on, one.slot(0, 0, SIZE)) for one in receivers]
        sender.close()
        for one in waiting:
            with pytest.raises(RuntimeError):
                one.result()
    assert time.monotonic() - began < 30
    with pytest.raises(RuntimeError, match="closed"):
        sender.pass_on(sender.slot(0, 0, SIZE))


def test_threads_are_spared_and_given_back() -> None:
    before, seen = torch.get_num_threads(), []

    def fail() -> None:
        seen.append(torch.get_num_threads())
        raise WeightSyncError("broken off")

    torch.set_num_threads(6)
    try:
        with pytest.raises(WeightSyncError), threads_spared():
            fail()
        assert [*seen, torch.get_num_threads()] == [4, 6]
    finally:
        torch.set_num_threads(before)
