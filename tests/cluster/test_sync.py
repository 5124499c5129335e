"""The order of a push, and that no engine serves a version that was not proved to it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from sync_parties import Engine, System

from medrl.actors.types import Receipt
from medrl.cluster import start, sync
from medrl.cluster.proof import first_difference
from medrl.configs.errors import EngineError, LearnerError, UserError, WeightSyncError, as_death
from medrl.configs.schema import Config, DataConfig, ModelConfig, PlacementConfig, RunConfig


def phases(calls: Sequence[str]) -> list[set[str]]:
    """Calls in order, those of one kind side by side as one set."""
    kinds = {"receive": "transfer", "send": "transfer", "address": "ask", "weights": "ask"}
    found: list[tuple[str, set[str]]] = []
    for call in calls:
        method = call.split(".")[1]
        kind = kinds.get(method, method)
        if not found or found[-1][0] != kind:
            found.append((kind, set()))
        found[-1][1].add(call)
    return [names for _, names in found]


async def test_a_push_pauses_moves_proves_and_only_then_resumes() -> None:
    system = System()
    await system.sync.push(2, 2)
    system.journal.calls.clear()
    receipt = await system.sync.push(version=3, step=3)
    assert phases(system.journal.calls) == [
        {"e0.pause", "e1.pause"},
        {"learner.send", "e0.receive", "e1.receive"},
        {"e0.canary", "e1.canary"},
        {"learner.logprobs"},
        {"e0.resume", "e1.resume"},
    ]
    assert system.serving() == [3, 3]
    assert (receipt.version, receipt.step, receipt.engines) == (3, 3, 2)
    assert (receipt.tensors, receipt.bytes, receipt.digests_equal) == (2, 48, True)
    assert receipt.canary_gap == 0
    assert 0 <= receipt.seconds_transfer <= receipt.seconds


async def test_opening_gives_each_engine_a_rank_of_its_own_and_all_the_same_plan() -> None:
    system = System(engines=3, workers_per_engine=2, timeout_s=7.0)
    await system.sync.push(0, 0)
    assert [engine.rank for engine in system.engines.values()] == [1, 2, 3]
    plan = system.learner.plan
    assert all(engine.plan == plan for engine in system.engines.values())
    assert (plan.address, plan.port, plan.timeout_s) == ("host", 1234, 7.0)
    assert plan.world_size == 1 + 3 * 2  # vLLM's workers join, not engines


async def test_a_group_is_formed_once_and_again_only_when_membership_changes() -> None:
    system = System()
    for version in range(3):
        await system.sync.push(version, version)
    assert system.journal.calls.count("learner.open") == 1
    system.engines[1] = Engine("new", system.journal)  # engine 1 was restarted
    system.pool.add(1, system.engines[1])
    await system.sync.push(3, 3)
    assert system.journal.calls.count("learner.open") == 2
    assert system.serving() == [3, 3]
    system.pool.fail(0, system.engines[0], EngineError("gone"))
    receipt = await system.sync.push(4, 4)
    assert receipt.engines == 1
    assert system.engines[1].plan.world_size == 2


async def test_a_digest_that_differs_names_engine_and_first_tensor_and_nobody_serves() -> None:
    system = System()
    system.engines[1].digests = {"embed": "aa", "head": "cc"}
    with pytest.raises(
        WeightSyncError, match=r"engine 1 received other .* head: sent bb, received cc"
    ):
        await system.sync.push(1, 1)
    assert system.serving() == [None, None]
    assert not any("canary" in call for call in system.journal.calls)


@pytest.mark.parametrize("logprob", [-1.001, math.nan], ids=["gap", "not a number"])
async def test_a_canary_off_the_learners_logprobs_stops_the_push(logprob: float) -> None:
    system = System()
    system.engines[1].logprob = logprob
    with pytest.raises(WeightSyncError, match=r"engine 1, but on the canary .*0\.0001 is allowed"):
        await system.sync.push(1, 1)
    assert system.serving() == [None, None]


async def test_canaries_that_engines_say_alike_are_scored_once_and_others_each() -> None:
    system = System(engines=3)
    await system.sync.push(1, 1)
    assert system.journal.calls.count("learner.logprobs") == 1
    system.engines[1].says = (1, 3)
    await system.sync.push(2, 2)
    assert system.journal.calls.count("learner.logprobs") == 1 + 2
    system.engines[2].logprob = -1.1  # said alike, and still off
    with pytest.raises(WeightSyncError, match="engine 2, but on the canary"):
        await system.sync.push(3, 3)


async def test_the_receipt_tells_the_largest_gap() -> None:
    system = System(max_gap=0.1)
    system.engines[0].logprob = -1.03
    system.engines[1].logprob = -0.95
    assert (await system.sync.push(1, 1)).canary_gap == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("method", "phase"),
    [
        ("pause", "pausing"),
        ("open", "joining the transfer group"),
        ("receive", "moving weights"),
        ("canary", "sampling the canary"),
        ("resume", "resuming"),
    ],
)
async def test_an_engine_that_hangs_leaves_and_the_push_is_made_with_the_others(
    method: str, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It serves nothing: half its weights may have arrived."""
    monkeypatch.setattr("medrl.cluster.sync._GRACE_S", 0.0)
    system = System(timeout_s=0.05)
    system.engines[1].faults[method] = "hang"
    receipt = await system.sync.push(1, 1)
    assert receipt.engines == 1
    assert list(system.pool.serving) == [0]
    assert system.serving() == [1, None]
    assert [(o.who, o.cause) for o in system.outages] == [("engine 1", "no answer within 0.05 s")]


async def test_a_push_waits_for_an_engine_and_brings_it_the_version() -> None:
    system = System(engines=1)
    await system.sync.push(1, 1)
    system.engines[0].faults["receive"] = as_death(EngineError("engine 0 died"))
    push = asyncio.create_task(system.sync.push(2, 2))
    await asyncio.sleep(0.01)
    assert not push.done()
    system.engines[0] = Engine("new", system.journal)
    system.pool.add(0, system.engines[0])
    assert (await push).version == 2
    assert system.serving() == [2]
    assert [outage.event for outage in system.outages] == ["left", "returned"]


async def test_without_an_engine_that_could_come_back_a_push_tells_the_first_cause() -> None:
    system = System(engines=1)
    system.engines[0].faults["pause"] = as_death(EngineError("engine 0 ran out of memory"))
    push = asyncio.create_task(system.sync.push(2, 2))
    await asyncio.sleep(0.01)
    system.pool.close("no engine came back")
    with pytest.raises(EngineError, match=r"^engine 0 ran out of memory\nno engine came back$"):
        await push


async def test_while_the_learner_waits_an_engine_that_came_back_is_brought_the_version() -> None:
    """It alone: the others serve on. One that came back half is not served from."""
    system = System()
    await system.sync.push(4, 4)
    system.pool.fail(1, system.engines[1], EngineError("gone"))
    receipts: list[Receipt] = []
    done = asyncio.Event()
    work = asyncio.create_task(system.sync.attend(done.wait(), receipts.append))
    await asyncio.sleep(0.01)
    system.journal.calls.clear()
    system.engines[1] = Engine("new", system.journal)
    system.pool.add(1, system.engines[1])
    await system.pool.until(lambda: 1 in system.pool.serving)
    assert not [call for call in system.journal.calls if call.startswith("e0")]
    assert system.serving() == [4, 4]
    done.set()
    assert await work
    assert [(receipt.version, receipt.engines) for receipt in receipts] == [(4, 1)]


async def test_the_learners_death_is_told_as_such() -> None:
    system = System()
    system.learner.faults["send"] = as_death(LearnerError("learner rank 1 died"))
    with pytest.raises(LearnerError, match="rank 1 died") as caught:
        await system.sync.push(1, 1)
    assert caught.value.died
    assert system.serving() == [None, None]
    assert list(system.pool.up) == [0, 1]


async def test_a_pause_may_take_as_long_as_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running groups end first; with staleness they may be long, and that is no failed sync."""
    monkeypatch.setattr("medrl.cluster.sync._GRACE_S", 0.0)
    system = System(timeout_s=0.05, drain_timeout_s=5.0)
    pause = system.engines[0].pause

    async def slow() -> None:
        await asyncio.sleep(0.2)
        await pause()

    system.engines[0].pause = slow  # type: ignore[method-assign]
    await system.sync.push(1, 1)
    assert system.serving() == [1, 1]


async def test_a_push_that_breaks_half_way_is_made_again_in_a_new_group() -> None:
    system = System()
    await system.sync.push(0, 0)
    system.engines[0].faults["receive"] = WeightSyncError("connection closed by peer")
    system.engines[1].faults["receive"] = as_death(EngineError("engine 1 died"))
    push = asyncio.create_task(system.sync.push(1, 1))
    await asyncio.sleep(0)
    system.engines[0].faults.clear()
    receipt = await push
    assert receipt.engines == 1
    assert system.serving() == [1, None]
    assert system.journal.calls.count("learner.open") == 2


async def test_an_error_of_both_sides_tells_both() -> None:
    system = System()
    await system.sync.push(0, 0)
    system.journal.calls.clear()
    system.learner.faults["send"] = WeightSyncError("bucket 3 timed out")
    system.engines[1].faults["receive"] = WeightSyncError("bucket 2 timed out")
    told = r"^sync: moving weights failed\. learner: bucket 3 .* engine 1: bucket 2 timed out\n"
    with pytest.raises(WeightSyncError, match=told):
        await system.sync.push(1, 1)
    assert system.journal.calls.count("learner.send") == 4  # tried again, but not for ever
    assert system.journal.calls.count("learner.open") == 3  # each in a new group
    assert system.serving() == [None, None]


async def test_a_users_mistake_stays_one() -> None:
    system = System()
    system.engines[0].faults["canary"] = UserError("the canary prompt is too long")
    with pytest.raises(UserError, match="too long"):
        await system.sync.push(1, 1)


def test_first_difference_sees_missing_changed_and_extra_tensors() -> None:
    assert first_difference({"a": "1", "b": "2"}, {"a": "1", "b": "2"}) == ""
    assert first_difference({"a": "1", "b": "2"}, {"a": "1"}) == "b: sent 2, received nothing"
    assert first_difference({"a": "1"}, {"a": "2"}) == "a: sent 1, received 2"
    assert first_difference({}, {"c": "3"}) == "c: received, but never sent"


def test_ranks_outlive_an_engine_that_hangs_and_the_sync_waits_for_their_word() -> None:
    """Rank 0 gives an engine up after sync_timeout_s; until then the others wait for rank 0."""
    config = Config(
        run=RunConfig(name="x"),
        model=ModelConfig(path="."),
        data=DataConfig(train="."),
        placement=PlacementConfig(sync_timeout_s=30),
    )
    inputs, device = SimpleNamespace(image_root=Path()), SimpleNamespace(device="cpu")
    settings = start._settings(config, inputs, device)  # type: ignore[arg-type]
    assert 30 + 1 < settings.collective_timeout_s < 30 + sync._GRACE_S - 1
