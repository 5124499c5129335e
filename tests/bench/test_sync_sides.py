"""Both sides of the sync's benchmark move what they say they move."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from medrl.actors.fake_engine import FakeEngine, FakeWire
from medrl.actors.pool import EnginePool
from medrl.bench.facts import Fact, Refused
from medrl.bench.fake_world import MODE, PROMPTS
from medrl.bench.pushes import Pushes
from medrl.bench.raw_broadcast import Peer, Seen, facts, free_port
from medrl.cluster.requests import Requests
from medrl.configs.schema import RolloutConfig
from medrl.data.schedule import Schedule
from medrl.learner.fake_learner import FakeLearner
from medrl.rewards.modes import get_mode


def check(found: tuple[Fact, ...]) -> None:
    for fact in found:
        fact.check()


@pytest.fixture(scope="module")
def seen() -> list[list[Seen]]:
    """Three runs of a sender and two receivers; the last piece is a short one."""
    peers, port = [Peer(1000, 64) for _ in range(3)], free_port()
    with ThreadPoolExecutor(len(peers)) as threads:
        joins = [threads.submit(peer.join, port, rank, 3) for rank, peer in enumerate(peers)]
        for joined in joins:
            joined.result()
        return [list(threads.map(Peer.move, peers)) for _ in range(3)]


def test_a_raw_broadcast_brings_other_bytes_to_all_each_time(seen: list[list[Seen]]) -> None:
    assert len({one.digest for run in seen for one in run}) == len(seen)
    assert all(one.seconds > 0 for run in seen for one in run)
    check(facts(seen))


def test_a_raw_broadcast_that_did_not_arrive_is_refused(seen: list[list[Seen]]) -> None:
    sender, first, second = seen[-1]
    lost = [*seen[:-1], [sender, first, replace(second, digest=seen[0][0].digest)]]
    for wrong in (lost, [seen[0], seen[0]], []):
        with pytest.raises(Refused):
            check(facts(wrong))


async def pushes(learning_rate: float) -> tuple[Fact, ...]:
    """Of three pushes from a learner to two engines, all fakes."""
    wire, pool = FakeWire(), EnginePool()
    for index in range(2):
        pool.add(index, FakeEngine(wire, index=index))
    requests = Requests(
        prompts=PROMPTS,
        schedule=Schedule(len(PROMPTS), seed=0),
        mode=get_mode(MODE),
        rollout=RolloutConfig(),
        seed=0,
    )
    run = Pushes(FakeLearner(wire, skill=0.5, learning_rate=learning_rate), pool, requests)
    for _ in range(3):
        assert await run.once() > 0
    assert [receipt.engines for receipt in run.receipts] == [2, 2, 2]
    return run.facts()


async def test_pushes_of_weights_that_stay_as_they_were_are_refused() -> None:
    check(await pushes(learning_rate=1e-3))
    with pytest.raises(Refused, match="left 1 of 1 tensors as they were"):
        check(await pushes(learning_rate=0.0))
