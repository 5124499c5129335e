"""The buffer's invariant: no batch is staler than the bound, and nothing is thrown away for it."""

import asyncio
import random

import pytest
from builders import make_scored
from hypothesis import given, settings
from hypothesis import strategies as st

from medrl.actors.buffer import GroupBuffer
from medrl.actors.types import ScoredGroup


def scored(draw: int, version: int) -> ScoredGroup:
    return make_scored(draw, version=version)


async def simulate(prompts: int, staleness: int, batches: int, seed: int) -> list[list[int]]:
    """Groups finish in random order at random speeds; returns the draws of each batch."""
    rng = random.Random(seed)
    buffer = GroupBuffer(prompts=prompts, staleness=staleness, total_batches=batches)
    taken: list[list[int]] = []
    in_flight = 0
    most_in_flight = 0

    async def one(draw: int) -> None:
        nonlocal in_flight, most_in_flight
        in_flight += 1
        most_in_flight = max(most_in_flight, in_flight)
        version = buffer.version
        for _ in range(rng.choice((0, 0, 1, 3, 40))):
            await asyncio.sleep(0)
        in_flight -= 1
        await buffer.put(scored(draw, version))

    async def produce() -> None:
        async with asyncio.TaskGroup() as groups:
            while (draw := await buffer.admit()) is not None:
                groups.create_task(one(draw))

    producer = asyncio.create_task(produce())
    while batch := await buffer.take():
        ages = [buffer.version - group.group.version for group in batch]
        assert len(batch) == prompts
        assert max(ages) <= staleness
        taken.append([group.group.request.draw for group in batch])
        for _ in range(rng.choice((0, 5))):
            await asyncio.sleep(0)
        await buffer.advance(buffer.version + 1)
    await producer
    assert most_in_flight <= prompts * (staleness + 1)
    return taken


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.integers(1, 5),
    staleness=st.integers(0, 3),
    batches=st.integers(1, 8),
    seed=st.integers(0, 10_000),
)
def test_every_draw_is_trained_once_and_never_too_old(
    prompts: int, staleness: int, batches: int, seed: int
) -> None:
    taken = asyncio.run(simulate(prompts, staleness, batches, seed))
    assert sorted(draw for batch in taken for draw in batch) == list(range(prompts * batches))


def test_staleness_0_trains_the_draws_in_order_batch_by_batch() -> None:
    taken = asyncio.run(simulate(prompts=3, staleness=0, batches=4, seed=1))
    assert taken == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


async def test_a_batch_is_the_first_scored_and_the_surplus_is_kept() -> None:
    buffer = GroupBuffer(prompts=2, staleness=1, total_batches=2)
    for _ in range(4):
        await buffer.admit()
    for draw in (3, 1, 0, 2):
        await buffer.put(scored(draw, 0))
    assert [g.group.request.draw for g in await buffer.take()] == [1, 3]
    await buffer.advance(1)
    assert [g.group.request.draw for g in await buffer.take()] == [0, 2]


async def test_a_group_about_to_expire_is_waited_for_though_enough_others_are_scored() -> None:
    buffer = GroupBuffer(prompts=1, staleness=1, total_batches=3)
    assert [await buffer.admit(), await buffer.admit()] == [0, 1]
    await buffer.put(scored(1, 0))
    assert (await buffer.take())[0].group.request.draw == 1
    await buffer.advance(1)
    assert await buffer.admit() == 2
    await buffer.put(scored(2, 1))
    with pytest.raises(TimeoutError):  # draw 0, started at version 0, may not wait for version 2
        await asyncio.wait_for(buffer.take(), 0.05)
    await buffer.put(scored(0, 0))
    assert (await buffer.take())[0].group.request.draw == 0


async def test_a_failure_of_rolling_out_reaches_the_learner() -> None:
    buffer = GroupBuffer(prompts=1, staleness=0, total_batches=1)
    await buffer.fail(RuntimeError("engine gone"))
    with pytest.raises(RuntimeError, match="engine gone"):
        await buffer.take()


async def test_stop_ends_the_wait_and_keeps_what_is_scored() -> None:
    buffer = GroupBuffer(prompts=2, staleness=0, total_batches=1)
    await buffer.admit()
    await buffer.put(scored(0, 0))
    waiting = asyncio.create_task(buffer.take())
    await asyncio.sleep(0)
    await buffer.stop()
    assert await waiting == []
    assert [g.group.request.draw for g in buffer.state().ready] == [0]


async def test_a_restored_buffer_rolls_out_again_what_was_in_flight() -> None:
    first = GroupBuffer(prompts=2, staleness=1, total_batches=3)
    for _ in range(4):
        await first.admit()
    await first.put(scored(2, 0))
    second = GroupBuffer(prompts=2, staleness=1, total_batches=3)
    second.restore(first.state())
    assert [await second.admit() for _ in range(3)] == [0, 1, 3]
    for draw in (0, 1, 3):
        await second.put(scored(draw, 0))
    assert len(await second.take()) == 2


async def test_a_batch_that_became_no_version_is_rolled_out_again() -> None:
    """A checkpoint made after a batch failed in training must not miss its draws for ever."""
    first = GroupBuffer(prompts=2, staleness=0, total_batches=2)
    for draw in (await first.admit(), await first.admit()):
        await first.put(scored(draw or 0, 0))
    assert len(await first.take()) == 2
    assert not first.settled
    second = GroupBuffer(prompts=2, staleness=0, total_batches=2)
    second.restore(first.state())
    assert [await second.admit(), await second.admit()] == [0, 1]
    await first.advance(1)
    assert first.settled
    assert first.state().started == {}


async def test_a_run_made_shorter_than_its_checkpoint_ends_at_once() -> None:
    first = GroupBuffer(prompts=2, staleness=2, total_batches=9)
    for _ in range(5):
        await first.admit()
    await first.advance(1)
    second = GroupBuffer(prompts=2, staleness=2, total_batches=1)
    second.restore(first.state())
    async with asyncio.timeout(1):
        assert await second.take() == []
        assert await second.admit() is None


async def test_a_group_that_was_not_admitted_is_refused() -> None:
    buffer = GroupBuffer(prompts=1, staleness=0, total_batches=1)
    with pytest.raises(ValueError, match="not admitted"):
        await buffer.put(scored(5, 0))
    await buffer.admit()
    await buffer.put(scored(0, 0))
    with pytest.raises(ValueError, match="twice"):
        await buffer.put(scored(0, 0))
