"""The real loop, buffer, sampler, sync, journal and rewards, with an engine and a learner in plain
Python: it learns from rewards and only from rewards, whatever the staleness."""

import asyncio
import gc
import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from fake_runs import PROMPTS, Scorer, World, draws_trained

from medrl.actors.fake_engine import FakeEngine
from medrl.actors.types import (
    Group,
    RolloutRequest,
    Score,
    ScoredGroup,
    UpdateMetrics,
    WeightMeta,
)
from medrl.cluster.checkpoints import Checkpoints, DriverState, resume_from
from medrl.configs.errors import EngineError, RewardError, WeightSyncError
from medrl.data.schedule import Schedule
from medrl.reports.lines import read_lines


@pytest.mark.parametrize("staleness", [0, 1, 2])
async def test_the_loop_learns_from_rewards_at_any_staleness(
    tmp_path: Path, staleness: int
) -> None:
    world = World(tmp_path, steps=60, staleness=staleness, delays=(0.0, 0.001))
    await world.run()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert world.learner.skill > 0.9
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert [line["version"] for line in lines] == list(range(1, 61))
    assert max(line["staleness.max"] for line in lines) == staleness
    assert sorted(world.seen) == list(range(240))
    assert len(read_lines(tmp_path / "syncs.jsonl")) == 60


async def test_engines_that_share_the_learners_devices_rest_while_it_works(tmp_path: Path) -> None:
    world = World(tmp_path, steps=3)
    world.parts = replace(world.parts, take_turns=True)
    update = world.learner.update
    serving: list[bool] = []

    async def watched(batch: Sequence[ScoredGroup]) -> UpdateMetrics:
        serving.extend(engine.serving for engine in world.engines.values())
        return await update(batch)

    world.learner.update = watched  # type: ignore[method-assign]
    await world.run()
    assert serving == [False] * 6


@pytest.mark.parametrize("staleness", [0, 2])
async def test_dynamic_sampling_replaces_groups_that_teach_nothing(
    tmp_path: Path, staleness: int
) -> None:
    """And is the same run whenever it is synchronous, however fast its engines are."""
    world = World(tmp_path / "a", steps=12, staleness=staleness, max_replaced=3, skill=0.6)
    await world.run()
    lines = read_lines(tmp_path / "a" / "metrics.jsonl")
    assert len(lines) == 12
    assert max(line["staleness.max"] for line in lines) == staleness
    assert 0 < sum(line["replaced_groups"] for line in lines) <= 36
    assert max(line["replaced_groups"] for line in lines) <= 3
    if staleness:
        return
    assert all(line["replaced_groups"] == 3 for line in lines if line["zero_variance_groups"])
    slow = World(tmp_path / "b", steps=12, max_replaced=3, skill=0.6, delays=(0.0, 0.003))
    await slow.run()
    assert slow.learner.skill == world.learner.skill


async def test_shuffled_rewards_teach_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, steps=60, scorer=Scorer(shuffled=True))
    await world.run()
    assert world.learner.skill < 0.6


async def test_prompts_come_in_the_order_of_the_schedule(tmp_path: Path) -> None:
    world = World(tmp_path, steps=5)
    await world.run()
    schedule = Schedule(len(PROMPTS), seed=0)
    assert [schedule[d] for d in world.seen] == [schedule[d] for d in range(20)]


async def test_a_failure_that_is_no_death_ends_the_run_between_two_updates(tmp_path: Path) -> None:
    class Dying(FakeEngine):
        async def generate(self, request: RolloutRequest) -> Group:
            if request.draw == 9:
                raise EngineError("prompt p9 has 7 tokens, expected 8")
            return await super().generate(request)

    world = World(tmp_path, steps=10)
    world.engines[0].__class__ = Dying
    world.engines[1].__class__ = Dying
    with pytest.raises(EngineError, match="prompt p9 has 7 tokens, expected 8"):
        await world.run()
    assert world.learner.updates == world.buffer.version == 2


async def test_a_broken_reward_stops_the_run_and_is_never_a_zero(tmp_path: Path) -> None:
    class Broken(Scorer):
        async def score_group(self, group: Group) -> ScoredGroup:
            failed = Score(components={}, total=0.0, outcome="error", reason="KeyError: 'x'")
            return replace(await super().score_group(group), scores=(failed,) * 4)

    world = World(tmp_path, steps=10, scorer=Broken())
    with pytest.raises(RewardError, match="16 of 16"):
        await world.run()
    assert world.learner.updates == 0


@pytest.mark.parametrize("staleness", [0, 2])
async def test_a_run_that_a_broken_reward_stopped_can_be_resumed(
    tmp_path: Path, staleness: int
) -> None:
    """The batch that was refused is not lost: without it the resumed run would wait for ever."""

    class Broken(Scorer):
        async def score_group(self, group: Group) -> ScoredGroup:
            scored = await super().score_group(group)
            if group.request.draw < 12:
                return scored
            failed = Score(components={}, total=0.0, outcome="error", reason="KeyError: 'x'")
            return replace(scored, scores=(failed,) * 4)

    first = World(tmp_path, steps=6, staleness=staleness, scorer=Broken())
    with pytest.raises(RewardError):
        await first.run()
    step = first.buffer.version
    assert step == first.learner.updates == 3
    state = DriverState(step=step, fixed={}, buffer=first.buffer.state())
    folder = await Checkpoints(tmp_path / "checkpoints", keep=1).save(state, first.learner)
    second = World(tmp_path, steps=6, staleness=staleness)
    await resume_from(folder, second.buffer, second.learner)
    second.parts = replace(second.parts, max_failed_fraction=1.0)  # some failed ones were kept
    async with asyncio.timeout(20):
        await second.run()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == list(range(1, 7))
    assert draws_trained(tmp_path) == list(range(24))


async def test_an_update_whose_push_failed_is_recorded_and_can_be_saved(tmp_path: Path) -> None:
    """A push that arrives wrong costs no update: learner, buffer and journal agree."""

    class Deaf(FakeEngine):
        async def receive(self, weights: Sequence[WeightMeta]) -> Mapping[str, str]:
            digests = await super().receive(weights)
            return {"skill": "other"} if self._version == 2 else digests

    first = World(tmp_path, steps=6)
    first.engines[1].__class__ = Deaf
    with pytest.raises(WeightSyncError, match="engine 1 received other weights"):
        await first.run()
    assert first.learner.updates == first.buffer.version == 3
    assert first.buffer.settled
    second = World(tmp_path, steps=6)
    second.buffer.restore(first.buffer.state())
    second.learner.skill = first.learner.skill
    async with asyncio.timeout(20):
        await second.run()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == list(range(1, 7))
    assert draws_trained(tmp_path) == list(range(24))


@pytest.mark.parametrize("staleness", [0, 2])
async def test_stopped_and_resumed_trains_every_draw_once(tmp_path: Path, staleness: int) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    first = World(tmp_path, steps=12, staleness=staleness, delays=(0.0, 0.002))

    async def stop_at_5(step: int) -> None:
        if step == 5:
            await first.buffer.stop()

    first.parts = replace(first.parts, after_step=stop_at_5)
    await first.run()
    state = DriverState(step=5, fixed={}, buffer=first.buffer.state())
    folder = await checkpoints.save(state, first.learner)

    second = World(tmp_path, steps=12, staleness=staleness, skill=0.5)
    await resume_from(folder, second.buffer, second.learner)
    assert second.learner.skill == first.learner.skill
    second.journal.rewind(5)
    await second.run()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert draws_trained(tmp_path) == list(range(48))


async def test_stopped_and_resumed_is_the_same_run_when_synchronous(tmp_path: Path) -> None:
    whole = World(tmp_path / "whole", steps=8)
    await whole.run()
    first = World(tmp_path / "parts", steps=4)
    await first.run()
    second = World(tmp_path / "parts", steps=8, skill=0.9)
    second.buffer.restore(first.buffer.state())
    second.learner.skill = first.learner.skill
    await second.run()
    assert second.learner.skill == pytest.approx(whole.learner.skill, abs=1e-12)


async def test_the_driver_does_not_grow_with_the_number_of_steps(tmp_path: Path) -> None:
    world = World(tmp_path, steps=1000)
    traced: dict[int, int] = {}
    resident: dict[int, int] = {}

    async def measure(step: int) -> None:
        if step in (200, 1000):
            gc.collect()
            traced[step] = tracemalloc.get_traced_memory()[0]
            resident[step] = psutil.Process().memory_info().rss

    world.parts = replace(world.parts, after_step=measure)
    world.request = world.requests.train  # type: ignore[method-assign]  # without the list it keeps
    world.parts = replace(world.parts, request=world.requests.train)
    tracemalloc.start()
    try:
        await world.run()
    finally:
        tracemalloc.stop()
    assert traced[1000] - traced[200] < 200_000
    assert resident[1000] - resident[200] < 16 * 2**20


def test_a_slow_engine_holds_up_no_batch_that_may_be_stale(tmp_path: Path) -> None:
    """With a bound above 0 the learner goes on while the slow engine is still at it."""

    async def wall(staleness: int, folder: Path) -> float:
        world = World(folder, steps=6, staleness=staleness, delays=(0.0, 0.05))
        loop = asyncio.get_running_loop()
        began = loop.time()
        await world.run()
        return loop.time() - began

    synchronous = asyncio.run(wall(0, tmp_path / "sync"))
    stale = asyncio.run(wall(3, tmp_path / "stale"))
    assert stale < synchronous
