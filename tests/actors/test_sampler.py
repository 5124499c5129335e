"""The pool gives a group to the engine with the least work, and waits for no slow engine."""

import asyncio

import pytest
from builders import make_request

from medrl.actors.fake_engine import FakeEngine, FakeWire
from medrl.actors.sampler import Sampler
from medrl.actors.types import Group, RolloutRequest, SyncPlan, WeightMeta
from medrl.configs.errors import EngineError


async def engine(index: int, seconds: float) -> FakeEngine:
    wire = FakeWire()
    made = FakeEngine(wire, index=index, seconds=seconds)
    plan = SyncPlan(transport="gloo", address="127.0.0.1", port=1, world_size=2, bucket_bytes=1024)
    await made.open_transfer(plan, 1)
    wire.mailboxes[1].put_nowait(("skill", (0.5,)))
    await made.receive([WeightMeta(name="skill", dtype="float32", shape=(1,))])
    await made.resume(0)
    return made


async def test_groups_spread_evenly_over_equal_engines() -> None:
    engines = [await engine(i, 0.01) for i in range(3)]
    sampler = Sampler(engines, max_sequences=4, timeout_s=5)
    groups = await asyncio.gather(*(sampler.sample(make_request(d)) for d in range(12)))
    assert [sum(g.engine == i for g in groups) for i in range(3)] == [4, 4, 4]


async def test_a_slow_engine_gets_less_and_holds_nobody_up() -> None:
    engines = [await engine(0, 0.2), await engine(1, 0.005)]
    sampler = Sampler(engines, max_sequences=2, timeout_s=5)
    groups = await asyncio.gather(*(sampler.sample(make_request(d)) for d in range(10)))
    assert sum(g.engine == 1 for g in groups) >= 8


async def test_a_group_larger_than_the_limit_still_runs() -> None:
    sampler = Sampler([await engine(0, 0.0)], max_sequences=2, timeout_s=5)
    assert len((await sampler.sample(make_request(0, completions=8))).completions) == 8


async def test_an_engine_that_does_not_answer_is_named() -> None:
    sampler = Sampler([await engine(0, 10.0)], max_sequences=4, timeout_s=0.05)
    with pytest.raises(EngineError, match=r"engine 0: no answer to prompt p3 within 0\.05 s"):
        await sampler.sample(make_request(3))


async def test_an_answer_to_another_question_is_refused() -> None:
    class Confused(FakeEngine):
        async def generate(self, request_: RolloutRequest) -> Group:
            return await super().generate(make_request(99))

    good = await engine(0, 0.0)
    good.__class__ = Confused
    sampler = Sampler([good], max_sequences=4, timeout_s=5)
    with pytest.raises(EngineError, match="answered prompt p99"):
        await sampler.sample(make_request(1))


async def test_idle_time_is_that_of_engines_without_work() -> None:
    sampler = Sampler([await engine(0, 0.2), await engine(1, 0.0)], max_sequences=4, timeout_s=5)
    sampler.take_idle_seconds()
    await sampler.sample(make_request(0))
    assert 0.08 < sampler.take_idle_seconds() < 0.15  # one of two engines, for 0.2 s
