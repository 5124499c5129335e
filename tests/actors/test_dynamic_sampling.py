"""Groups of equal scores make way for the next draws: up to a bound, exactly, and whatever the
timing."""

import asyncio
import random

import pytest
import torch
from builders import make_score, make_scored
from hypothesis import given, settings
from hypothesis import strategies as st
from test_buffer import Run, simulate

from medrl.actors.buffer import GroupBuffer
from medrl.learner.grpo import zero_variance

STALENESS = st.sampled_from([0, 1, 3])


def uniform_draws(seed: int, share: float) -> set[int]:
    rng = random.Random(seed)
    return {draw for draw in range(2000) if rng.random() < share}


def expected(prompts: int, batches: int, bound: int, uniform: set[int]) -> Run:
    """Synchronous, from the rule alone: the shortest run of draws that fills the batch."""
    run, draw = Run(), 0
    for _ in range(batches):
        batch: list[int] = []
        replaced: list[int] = []
        while len(batch) < prompts:
            out = draw in uniform and len(replaced) < bound
            (replaced if out else batch).append(draw)
            draw += 1
        run.batches.append(batch)
        run.replaced.append(replaced)
    return run


@settings(max_examples=400, deadline=None)
@given(
    prompts=st.integers(1, 5),
    staleness=STALENESS,
    batches=st.integers(1, 6),
    bound=st.integers(0, 7),
    share=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    stops=st.lists(st.integers(1, 6), max_size=3),
    seed=st.integers(0, 10_000),
)
def test_every_draw_is_trained_or_replaced_once_within_the_bound(
    prompts: int,
    staleness: int,
    batches: int,
    bound: int,
    share: float,
    stops: list[int],
    seed: int,
) -> None:
    """Also over checkpoints. `simulate` checks that batches are full and never too old."""
    uniform = uniform_draws(seed, share)

    run = asyncio.run(
        simulate(
            prompts,
            staleness,
            batches,
            seed,
            max_replaced=bound,
            uniform=uniform.__contains__,
            stops=stops,
        )
    )
    assert [len(batch) for batch in run.batches] == [prompts] * batches
    assert run.draws == list(range(len(run.draws)))  # none passed over, none twice
    assert {draw for each in run.replaced for draw in each} <= uniform
    # What was replaced for a batch that was then lost is told with the next.
    lost = len(stops) if staleness else 0
    assert max(map(len, run.replaced)) <= bound * (1 + lost)
    if staleness == 0:
        want = expected(prompts, batches, bound, uniform)
        assert (run.batches, run.replaced) == (want.batches, want.replaced)
    if bound == 0:
        assert run.draws == list(range(prompts * batches))


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_where_nothing_teaches_anything_a_run_still_ends(staleness: int) -> None:
    """The fallback: past the bound such groups are trained, at an advantage of 0."""
    run = asyncio.run(simulate(3, staleness, 5, seed=1, max_replaced=4, uniform=lambda draw: True))
    assert [len(batch) for batch in run.batches] == [3] * 5
    assert max(map(len, run.replaced)) <= 4
    if staleness == 0:
        assert [len(replaced) for replaced in run.replaced] == [4] * 5


async def test_a_replaced_group_frees_its_place_at_once() -> None:
    """Not only when the batch is taken, which would wait for it for ever."""
    buffer = GroupBuffer(prompts=2, staleness=0, total_batches=1, max_replaced=1)
    assert [await buffer.admit(), await buffer.admit()] == [0, 1]
    same = (make_score(1.0), make_score(1.0))
    await buffer.put(make_scored(1, scores=same))
    assert await asyncio.wait_for(buffer.admit(), 1) == 2
    await buffer.put(make_scored(0, scores=same))  # past the bound, but the earlier draw
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(buffer.admit(), 0.05)
    await buffer.put(make_scored(2))
    assert [g.group.request.draw for g in await buffer.take()] == [1, 2]
    assert [g.group.request.draw for g in buffer.replaced] == [0]


async def test_a_group_with_a_failed_score_stays_where_failures_are_counted() -> None:
    buffer = GroupBuffer(prompts=1, staleness=0, total_batches=1, max_replaced=1)
    await buffer.admit()
    await buffer.put(make_scored(0, scores=(make_score(1.0), make_score(0.0, "error"))))
    assert [g.group.request.draw for g in await buffer.take()] == [0]
    assert buffer.replaced == []


async def test_what_was_replaced_stays_replaced_in_a_restored_buffer() -> None:
    """Neither trained later nor forgotten, and its share of the bound is spent."""
    first = GroupBuffer(prompts=1, staleness=0, total_batches=2, max_replaced=2)
    same = (make_score(1.0), make_score(1.0))
    for _ in range(3):  # all equal: two make way, the third is trained
        await first.put(make_scored(await first.admit() or 0, scores=same))
    assert [g.group.request.draw for g in await first.take()] == [2]
    second = GroupBuffer(prompts=1, staleness=0, total_batches=2, max_replaced=2)
    second.restore(first.state())  # the update failed: its batch is rolled out again
    assert await second.admit() == 2
    await second.put(make_scored(2, scores=same))
    batch = await asyncio.wait_for(second.take(), 1)
    assert [g.group.request.draw for g in batch] == [2]
    assert [g.group.request.draw for g in second.replaced] == [0, 1]
    await second.advance(1)
    assert await second.admit() == 3


rewards = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1 + 0.2, 0.3, 0.5, 1.0, -1.0]), st.booleans()),
    min_size=1,
    max_size=5,
)


@given(rewards)
def test_buffer_and_learner_agree_on_what_teaches_nothing(
    rewards: list[tuple[float, bool]],
) -> None:
    scores = tuple(make_score(total, "error" if failed else "ok") for total, failed in rewards)
    totals = torch.tensor([[total for total, _ in rewards]], dtype=torch.float64)
    valid = torch.tensor([[not failed for _, failed in rewards]])
    assert make_scored(scores=scores).uniform == bool(zero_variance(totals, valid)[0])
