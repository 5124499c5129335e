"""Engines that die, hang and come back under the real loop: nothing is lost, nothing done twice,
and nothing is sampled from weights that no receipt proves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fake_runs import World, draws_trained

from medrl.actors.fake_engine import FakeEngine
from medrl.actors.pool import MAX_DEATHS, EnginePool, Outage
from medrl.actors.types import Group, RolloutRequest, SyncPlan, WeightMeta
from medrl.cluster.journal import read_lines
from medrl.cluster.supervise import Supervisor
from medrl.configs.errors import EngineError, as_death

START_S = 0.02  # of a mortal engine
HEARTBEAT_S = 0.2  # a loaded machine holds up even a fake's answer
KILLS_S = 0.2  # mean time between two faults of an engine


class Mortal(FakeEngine):
    """A fake that can die or hang in any call, from outside."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._dead = asyncio.Event()
        self._hangs = False

    def die(self) -> None:
        self._dead.set()

    def hang(self) -> None:
        self._hangs = True

    async def _mortal(self, call: Awaitable[Any]) -> Any:
        work = asyncio.ensure_future(call)
        death = asyncio.ensure_future(self._dead.wait())
        try:
            await asyncio.wait({work, death}, return_when=asyncio.FIRST_COMPLETED)
            if self._hangs:
                await death
            if death.done():
                raise as_death(EngineError(f"engine {self._index} was killed"))
            return work.result()
        finally:
            work.cancel()
            death.cancel()

    async def generate(self, request: RolloutRequest) -> Group:
        group: Group = await self._mortal(super().generate(request))
        return group

    async def ping(self) -> None:
        await self._mortal(super().ping())

    async def pause(self) -> None:
        await self._mortal(super().pause())

    async def open_transfer(self, plan: SyncPlan, rank: int) -> None:
        await self._mortal(super().open_transfer(plan, rank))

    async def receive(self, weights: Sequence[WeightMeta]) -> Mapping[str, str]:
        digests: Mapping[str, str] = await self._mortal(super().receive(weights))
        return digests

    async def canary(self, request: RolloutRequest) -> Group:
        group: Group = await self._mortal(super().canary(request))
        return group

    async def resume(self, version: int) -> None:
        await self._mortal(super().resume(version))

    async def close(self) -> None:
        self.die()  # whoever still waits for it hears so


class FaultyWorld(World):
    """A run whose engines are supervised, and die at random moments."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(folder, kind=Mortal, **settings)
        self.outages: list[Outage] = []
        self.pool.tell = self.outages.append
        self.supervisor = Supervisor(
            self.pool, self.start, heartbeat_s=HEARTBEAT_S, patience_s=60.0
        )

    async def start(self, index: int) -> FakeEngine:
        await asyncio.sleep(START_S)
        self.engines[index] = Mortal(self.wire, index=index, seconds=0.001)
        return self.engines[index]

    async def chaos(self, seed: int, kinds: Sequence[str]) -> None:
        rng = random.Random(seed)
        while True:
            await asyncio.sleep(rng.expovariate(len(self.engines) / KILLS_S))
            getattr(rng.choice(list(self.engines.values())), rng.choice(kinds))()

    async def run(self) -> None:
        async with self.supervisor.watching(list(self.engines)):
            await super().run()

    async def run_under(self, seed: int, kinds: Sequence[str] = ("die", "hang")) -> None:
        chaos = asyncio.create_task(self.chaos(seed, kinds))
        try:
            async with asyncio.timeout(120):
                await self.run()
        finally:
            chaos.cancel()


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medrl.cluster.supervise.POLL_S", 0.005)


@pytest.mark.parametrize("engines", [1, 3])
@pytest.mark.parametrize("staleness", [0, 2])
async def test_every_draw_is_trained_once_whatever_dies(
    tmp_path: Path, staleness: int, engines: int
) -> None:
    """And where the run is synchronous it is the undisturbed one, to the last bit."""
    delays = (0.001,) * engines
    world = FaultyWorld(tmp_path / "faulty", steps=100, staleness=staleness, delays=delays)
    await world.run_under(seed=engines)
    lines = read_lines(tmp_path / "faulty" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [line["version"] for line in lines]
    assert [line["step"] for line in lines] == list(range(1, 101))
    assert max(line["staleness.max"] for line in lines) <= staleness
    assert draws_trained(tmp_path / "faulty") == list(range(400))
    versions = [line["version"] for line in read_lines(tmp_path / "faulty" / "syncs.jsonl")]
    assert versions == sorted(versions)
    events = [outage.event for outage in world.outages]
    assert min(events.count("left"), events.count("returned")) >= 2
    if not staleness:
        calm = World(tmp_path / "calm", steps=100)
        await calm.run()
        assert world.learner.skill == calm.learner.skill


async def test_an_idle_engine_that_hangs_is_noticed_within_its_deadline(tmp_path: Path) -> None:
    world = FaultyWorld(tmp_path, steps=0)
    await world.sync.push(0, 0)
    async with world.supervisor.watching([0, 1]):
        world.engines[1].hang()  # type: ignore[attr-defined]
        loop = asyncio.get_running_loop()
        began = loop.time()
        await world.pool.until(lambda: 1 not in world.pool.serving)
        assert HEARTBEAT_S <= loop.time() - began < HEARTBEAT_S + 5.0
        await world.pool.until(lambda: 1 in world.pool.stale)
    assert list(world.pool.serving) == [0]  # up again, but nothing was proved to it
    assert f"hangs: no answer to a ping within {HEARTBEAT_S:g} s" in world.outages[0].cause


async def test_an_engine_at_work_on_a_push_is_not_taken_for_dead(tmp_path: Path) -> None:
    """It answers no ping then; the push has deadlines of its own."""

    class Slow(Mortal):
        async def receive(self, weights: Sequence[WeightMeta]) -> Mapping[str, str]:
            await asyncio.sleep(0.2)
            return await super().receive(weights)

        async def ping(self) -> None:
            await asyncio.sleep(0.03)
            while not self.serving:
                await asyncio.sleep(0.01)

    world = FaultyWorld(tmp_path, steps=2)
    for engine in world.engines.values():
        engine.__class__ = Slow
    await world.run()
    assert not world.outages


async def test_a_crash_loop_ends_with_the_first_cause_on_top(tmp_path: Path) -> None:
    world = FaultyWorld(tmp_path, steps=5, delays=(0.0,))
    starts: list[int] = []

    async def broken(index: int) -> FakeEngine:
        starts.append(index)
        raise EngineError(f"no memory, try {len(starts)}")

    world.supervisor = Supervisor(world.pool, broken, heartbeat_s=HEARTBEAT_S, patience_s=60.0)
    world.engines[0].die()  # type: ignore[attr-defined]
    world.pool.serve(world.pool.up)
    with pytest.raises(EngineError, match=r"^engine 0 was killed\nno engine is left: .* 4 times"):
        async with asyncio.timeout(60):
            await world.run()
    assert len(starts) == MAX_DEATHS - 1
    again = [outage.cause for outage in world.outages if outage.event == "left"]
    assert again == ["engine 0 was killed", "no memory, try 1", "no memory, try 2"]
    assert world.outages[-1].event == "put off"


async def test_an_engine_in_a_crash_loop_is_tried_more_and_more_rarely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go on without it, and with it as soon as it does come back."""
    monkeypatch.setattr("medrl.actors.pool.PUT_OFF_S", 0.02)
    monkeypatch.setattr("medrl.actors.pool.MOST_PUT_OFF_S", 0.05)
    world = FaultyWorld(tmp_path, steps=60, delays=(0.0, 0.001))
    tries: list[float] = []

    async def broken(index: int) -> FakeEngine:
        tries.append(asyncio.get_running_loop().time())
        if len(tries) < 7:
            raise EngineError("its GPU fell off the bus")
        return await world.start(index)

    async def wait_for_it(step: int) -> None:
        if step == 50:
            await world.pool.until(lambda: 1 in world.pool.up)

    world.parts = replace(world.parts, after_step=wait_for_it)
    world.supervisor = Supervisor(world.pool, broken, heartbeat_s=HEARTBEAT_S, patience_s=60.0)
    world.engines[1].die()  # type: ignore[attr-defined]
    async with asyncio.timeout(60):
        await world.run()
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 60
    *outages, last = world.outages
    assert [(outage.event, outage.cause) for outage in outages] == [
        ("left", "engine 1 was killed"),
        *[("left", "its GPU fell off the bus")] * 2,
        *[("put off", "engine 1 was killed")] * 4,
    ]
    assert [one.seconds for one in outages[3:]] == [0.02, 0.04, 0.05, 0.05]
    waits = [after - before for before, after in pairwise(tries)]
    assert all(
        waited >= told for waited, told in zip(waits[2:], [0.02, 0.04, 0.05, 0.05], strict=True)
    )
    assert last.event == "returned"


def test_an_engine_put_off_says_for_how_long() -> None:
    outage = Outage(who="engine 1", event="put off", cause="engine 1 was killed", seconds=30.0)
    assert str(outage) == (
        "engine 1 died 4 times or more without finishing a group; it is tried again in 30 s, "
        "the others go on; the first cause: engine 1 was killed"
    )


async def test_without_an_engine_a_run_waits_no_longer_than_its_patience(tmp_path: Path) -> None:
    world = FaultyWorld(tmp_path, steps=500, delays=(0.001,))

    async def never(index: int) -> FakeEngine:
        await asyncio.Event().wait()
        raise AssertionError

    world.supervisor = Supervisor(world.pool, never, heartbeat_s=HEARTBEAT_S, patience_s=0.1)

    async def kill(step: int) -> None:
        if step == 3:
            world.engines[0].die()  # type: ignore[attr-defined]

    world.parts = replace(world.parts, after_step=kill)
    told = (
        r"^engine 0 was killed\nno engine came back within 0\.1 s \(placement\.start_timeout_s\)$"
    )
    with pytest.raises(EngineError, match=told):
        async with asyncio.timeout(60):
            await world.run()
    assert world.buffer.settled  # so that a checkpoint can be made
    assert world.buffer.version == world.learner.updates == 3


async def test_an_engine_that_serves_as_started_needs_no_push(tmp_path: Path) -> None:
    """Where engines evaluate the model they were started with, there is no learner."""
    world = FaultyWorld(tmp_path, steps=0)
    resumed: list[int] = []

    class FromDisk(Mortal):
        async def resume(self, version: int) -> None:
            resumed.append(version)

    async def start(index: int) -> FakeEngine:
        await asyncio.sleep(START_S)
        return FromDisk(world.wire, index=index)

    pool = EnginePool()
    pool.add(0, world.engines[0])
    pool.serve(pool.up)
    pool.serves_as_started = True
    supervisor = Supervisor(pool, start, heartbeat_s=HEARTBEAT_S, patience_s=60.0)
    async with supervisor.watching([0]):
        world.engines[0].die()  # type: ignore[attr-defined]
        await pool.until(lambda: not pool.serving)
        async with asyncio.timeout(60):
            await pool.until(lambda: pool.serving)
    assert resumed == [0]


class ElasticWorld(FaultyWorld):
    """A run of which `engines` may serve, where there is room for `room` of them; one is up."""

    def __init__(
        self, folder: Path, *, engines: int, room: int, steps: int = 60, patience_s: float = 60.0
    ) -> None:
        super().__init__(folder, steps=steps, delays=(0.001,))
        self._places = asyncio.Semaphore(room - 1)
        self._all = range(engines)
        self.trained_by: list[set[int]] = []
        self.at_step: dict[int, Callable[[], object]] = {}
        self.parts = replace(self.parts, after_step=self._look)
        self.supervisor = Supervisor(
            self.pool,
            self.start,
            heartbeat_s=HEARTBEAT_S,
            patience_s=patience_s,
            lacking=lambda: "no node has a free CPU",
        )

    async def start(self, index: int) -> FakeEngine:
        await self._places.acquire()
        return await super().start(index)

    def room_comes(self) -> None:
        self._places.release()

    async def run(self) -> None:
        async with self.supervisor.watching(self._all):
            await World.run(self)

    async def _look(self, step: int) -> None:
        self.trained_by.append(set(self.pool.serving))
        self.at_step.get(step, int)()
        await asyncio.sleep(0.005)  # so that an engine may start within a run of fakes

    def events(self) -> list[tuple[str, str]]:
        return [(outage.who, outage.event) for outage in self.outages]


async def test_the_pool_grows_when_room_comes_and_new_engines_hold_a_proved_version(
    tmp_path: Path,
) -> None:
    world = ElasticWorld(tmp_path, engines=3, room=2)
    world.at_step[30] = world.room_comes
    await world.run()
    assert world.events() == [("engine 1", "joined"), ("engine 2", "joined")]
    assert [str(outage) for outage in world.outages] == ["engine 1 joins", "engine 2 joins"]
    assert len(world.trained_by[29]) == 2
    assert world.trained_by[-1] == {0, 1, 2}
    syncs = read_lines(tmp_path / "syncs.jsonl")
    assert {receipt["engines"] for receipt in syncs} >= {1, 3}
    assert draws_trained(tmp_path) == list(range(240))


async def test_to_wait_for_room_is_no_death_while_another_engine_serves(tmp_path: Path) -> None:
    """And not given up, however long it takes."""
    world = ElasticWorld(tmp_path, engines=2, room=2, steps=200)

    def its_node_leaves() -> None:
        world.engines[1].die()  # type: ignore[attr-defined]

    world.at_step = {20: its_node_leaves, 199: lambda: world.pool.waits(1, "no CPU")}
    await world.run()
    joined, left, waiting = world.outages
    assert [it.event for it in (joined, left, waiting)] == ["joined", "left", "waiting"]
    assert str(waiting) == "engine 1 waits for room: no CPU"
    assert world.trained_by[-1] == {0}
    assert world.pool.deaths(1) == 1
    assert draws_trained(tmp_path) == list(range(800))


async def test_without_room_for_any_engine_the_run_stops_and_says_what_it_lacks(
    tmp_path: Path,
) -> None:
    world = ElasticWorld(tmp_path, engines=2, room=1, steps=500, patience_s=0.2)
    world.at_step[5] = world.engines[0].die  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match=r"start_timeout_s\); no node has a free CPU$"):
        async with asyncio.timeout(60):
            await world.run()
    assert world.buffer.settled
    assert world.events() == [("engine 0", "left")]


async def test_a_stop_does_not_wait_for_engines_that_die_after_it(tmp_path: Path) -> None:
    world = ElasticWorld(tmp_path, engines=1, room=1, steps=500)
    world.supervisor = Supervisor(world.pool, world.start, heartbeat_s=HEARTBEAT_S, patience_s=1e6)

    def stop() -> None:
        world.pool.stop("the run was asked to stop")
        asyncio.get_running_loop().call_later(0.02, world.engines[0].die)  # type: ignore[attr-defined]

    world.at_step[5] = stop
    with pytest.raises(EngineError, match=r"^engine 0 was killed\nthe run was asked to stop$"):
        async with asyncio.timeout(60):
            await world.run()
