"""The pool gives a group to the engine with the least work, and waits for no slow engine."""

import asyncio
import time

import pytest
from builders import make_engine, make_request, pool_of

from medrl.actors.fake_engine import FakeEngine, FakeWire
from medrl.actors.sampler import Sampler
from medrl.actors.types import Group, RolloutRequest
from medrl.configs.errors import EngineError, UserError, as_death


async def engine(index: int, seconds: float) -> FakeEngine:
    return await make_engine(index, seconds=seconds)


async def test_groups_spread_evenly_over_equal_engines() -> None:
    engines = [await engine(i, 0.01) for i in range(3)]
    sampler = Sampler(pool_of(engines), max_sequences=4, timeout_s=5)
    groups = await asyncio.gather(*(sampler.sample(make_request(d)) for d in range(12)))
    assert [sum(g.engine == i for g in groups) for i in range(3)] == [4, 4, 4]


async def test_a_slow_engine_gets_less_and_holds_nobody_up() -> None:
    engines = [await engine(0, 0.2), await engine(1, 0.005)]
    sampler = Sampler(pool_of(engines), max_sequences=2, timeout_s=5)
    groups = await asyncio.gather(*(sampler.sample(make_request(d)) for d in range(10)))
    assert sum(g.engine == 1 for g in groups) >= 8


async def test_a_group_larger_than_the_limit_still_runs() -> None:
    sampler = Sampler(pool_of([await engine(0, 0.0)]), max_sequences=2, timeout_s=5)
    assert len((await sampler.sample(make_request(0, completions=8))).completions) == 8


async def test_a_group_of_an_engine_that_hangs_goes_to_another() -> None:
    pool = pool_of([await engine(0, 10.0), await engine(1, 0.001)])
    sampler = Sampler(pool, max_sequences=4, timeout_s=0.05)
    assert (await sampler.sample(make_request(3))).engine == 1
    assert list(pool.up) == [1]


class Dying(FakeEngine):
    """Its process is gone as soon as it is asked for a group."""

    async def generate(self, request: RolloutRequest) -> Group:
        await asyncio.sleep(0)
        raise as_death(EngineError(f"engine {self._index} died"))


async def test_groups_of_an_engine_that_dies_wait_for_one_that_serves() -> None:
    """The same requests, asked again once an engine's version is proved; not before."""
    left = []
    pool = pool_of([Dying(FakeWire(), index=0)])
    pool.tell = left.append
    sampler = Sampler(pool, max_sequences=2, timeout_s=5)
    asked = [asyncio.create_task(sampler.sample(make_request(d))) for d in range(4)]
    await asyncio.sleep(0.01)
    assert [outage.event for outage in left] == ["left"]  # once, not once a group
    back = await engine(0, 0.0)
    pool.add(0, back)
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in asked)
    pool.serve({0: back})
    assert [g.request.draw for g in await asyncio.gather(*asked)] == [0, 1, 2, 3]
    assert [outage.event for outage in left] == ["left", "returned"]


async def test_a_group_that_engines_die_with_is_told_with_the_first_cause_on_top() -> None:
    pool = pool_of([Dying(FakeWire(), index=i) for i in range(5)])
    with pytest.raises(EngineError, match=r"^engine 0 died\n4 engines died with prompt p7"):
        await Sampler(pool, max_sequences=4, timeout_s=5).sample(make_request(7))
    assert list(pool.up) == [4]


async def test_what_is_no_death_goes_to_no_other_engine() -> None:
    class Refusing(FakeEngine):
        async def generate(self, request: RolloutRequest) -> Group:
            raise UserError("prompt p0 is too long")

    pool = pool_of([Refusing(FakeWire(), index=0), await engine(1, 0.0)])
    with pytest.raises(UserError, match="too long"):
        await Sampler(pool, max_sequences=4, timeout_s=5).sample(make_request(0))
    assert list(pool.up) == [0, 1]


async def test_an_answer_to_another_question_is_refused() -> None:
    class Confused(FakeEngine):
        async def generate(self, request_: RolloutRequest) -> Group:
            return await super().generate(make_request(99))

    good = await engine(0, 0.0)
    good.__class__ = Confused
    sampler = Sampler(pool_of([good]), max_sequences=4, timeout_s=5)
    with pytest.raises(EngineError, match="answered prompt p99"):
        await sampler.sample(make_request(1))


async def test_idle_time_is_that_of_engines_without_work() -> None:
    sampler = Sampler(
        pool_of([await engine(0, 0.2), await engine(1, 0.0)]), max_sequences=4, timeout_s=5
    )
    sampler.take_idle_seconds()
    began = time.monotonic()
    await sampler.sample(make_request(0))
    idle = sampler.take_idle_seconds()
    passed = time.monotonic() - began
    # One of two had nothing to do all the time, the other all but the 0.2 s of its group.
    assert passed / 2 - 0.02 <= idle <= passed - 0.1 + 0.01
