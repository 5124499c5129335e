"""The buffer's invariant: no batch is staler than the bound, and nothing is thrown away for it."""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from builders import make_score, make_scored
from hypothesis import given, settings
from hypothesis import strategies as st

from medrl.actors.buffer import GroupBuffer
from medrl.actors.types import ScoredGroup

DEADLOCK_S = 2.0  # nothing here takes a hundredth of it


def scored(draw: int, version: int) -> ScoredGroup:
    return make_scored(draw, version=version)


@dataclass
class Run:
    """What a learner saw: the draws of each batch, and of those replaced for it."""

    batches: list[list[int]] = field(default_factory=list)
    replaced: list[list[int]] = field(default_factory=list)
    most_in_flight: int = 0

    @property
    def draws(self) -> list[int]:
        return sorted(draw for each in (*self.batches, *self.replaced) for draw in each)


async def simulate(
    prompts: int,
    staleness: int,
    batches: int,
    seed: int,
    *,
    max_replaced: int = 0,
    uniform: Callable[[int], bool] = lambda draw: False,
    stops: Sequence[int] = (),
) -> Run:
    """Groups finish in random order at random speeds. After so many takes as `stops` names, all
    goes on in a new buffer from a checkpoint, whatever was in flight; half of them while a batch
    is being trained, which is then lost."""
    rng = random.Random(seed)
    run = Run()
    in_flight = 0

    def make() -> GroupBuffer:
        return GroupBuffer(
            prompts=prompts, staleness=staleness, total_batches=batches, max_replaced=max_replaced
        )

    async def one(buffer: GroupBuffer, draw: int) -> None:
        nonlocal in_flight
        in_flight += 1
        run.most_in_flight = max(run.most_in_flight, in_flight)
        version = buffer.version
        for _ in range(rng.choice((0, 0, 1, 3, 40))):
            await asyncio.sleep(0)
        in_flight -= 1
        scores = (make_score(1.0), make_score(1.0 if uniform(draw) else 0.0))
        await buffer.put(make_scored(draw, version=version, scores=scores))

    async def produce(buffer: GroupBuffer) -> None:
        async with asyncio.TaskGroup() as groups:
            while (draw := await buffer.admit()) is not None:
                groups.create_task(one(buffer, draw))

    buffer = make()
    producer = asyncio.create_task(produce(buffer))
    taken = 0
    while batch := await asyncio.wait_for(buffer.take(), DEADLOCK_S):
        ages = [buffer.version - group.group.version for group in batch]
        assert len(batch) == prompts
        assert max(ages) <= staleness
        replaced = [group.group.request.draw for group in buffer.replaced]
        taken += 1
        lost = taken in stops and rng.random() < 0.5
        if not lost:
            run.batches.append([group.group.request.draw for group in batch])
            run.replaced.append(replaced)
            for _ in range(rng.choice((0, 5))):
                await asyncio.sleep(0)
            await buffer.advance(buffer.version + 1)
        for _ in range(rng.choice((0, 2, 20))):
            await asyncio.sleep(0)
        if taken in stops:
            producer.cancel()
            await asyncio.wait({producer})
            in_flight = 0
            state, buffer = buffer.state(), make()
            buffer.restore(state)
            producer = asyncio.create_task(produce(buffer))
    await producer
    return run


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
    run = asyncio.run(simulate(prompts, staleness, batches, seed))
    assert run.draws == list(range(prompts * batches))
    assert run.most_in_flight <= prompts * (staleness + 1)


def test_staleness_0_trains_the_draws_in_order_batch_by_batch() -> None:
    run = asyncio.run(simulate(prompts=3, staleness=0, batches=4, seed=1))
    assert run.batches == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


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
