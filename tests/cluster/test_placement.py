"""What a run needs of a cluster, and the sentence that says what is missing."""

import asyncio
from typing import Any

import pytest

from medrl.cluster.placement import Placement, missing, needed_bundles, threads, wanted
from medrl.configs.schema import (
    Config,
    DataConfig,
    LearnerConfig,
    ModelConfig,
    PlacementConfig,
    RolloutConfig,
    RunConfig,
)


def test_ranks_come_first_and_engines_take_as_many_gpus_as_they_say() -> None:
    config = PlacementConfig(engines=2, gpus_per_engine=2, learners=3, cpus_per_process=2.0)
    bundles = needed_bundles(config, "gpu")
    assert [b["GPU"] for b in bundles] == [1, 1, 1, 2, 2]
    assert wanted(bundles) == {"CPU": 10, "GPU": 7}


def test_colocated_engines_share_the_ranks_gpus() -> None:
    config = PlacementConfig(engines=4, learners=4, colocate=True)
    assert wanted(needed_bundles(config, "gpu")) == {"CPU": 8, "GPU": 4}


def test_on_cpus_no_gpu_is_asked_for() -> None:
    config = PlacementConfig(engines=2, learners=2, cpus_per_process=0.4)
    assert wanted(needed_bundles(config, "cpu")) == {"CPU": 1.6}


def test_a_run_waits_for_the_fewest_engines_only() -> None:
    config = PlacementConfig(engines="2..8", learners=3, cpus_per_process=2.0)
    assert needed_bundles(config, "cpu") == [{"CPU": 2.0}] * 5


@pytest.mark.parametrize(
    ("staleness", "deterministic", "expected"),
    [(0, False, (4, 2)), (1, False, (2, 2)), (0, True, (1, 1))],
    ids=["in turns", "at once", "the same digits on any layout"],
)
def test_ranks_and_engines_share_a_machines_cores(
    staleness: int, deterministic: bool, expected: tuple[int, int]
) -> None:
    config = Config(
        run=RunConfig(name="x", deterministic=deterministic),
        model=ModelConfig(path="starter"),
        data=DataConfig(train="data"),
        rollout=RolloutConfig(staleness=staleness),
        learner=LearnerConfig(importance_cap=2.0),
        placement=PlacementConfig(engines="1..4", learners=2),
    )
    assert threads(config, cores=8) == expected
    assert threads(config, cores=1) == (1, 1)


class FakeRay:
    """Placement groups: whether each bundle has a node."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *bundles: bool) -> None:
        self.groups: dict[str, list[bool]] = {"first": list(bundles)}
        self.removed: list[str] = []
        monkeypatch.setattr("medrl.cluster.placement.placement_group", self._ask)
        monkeypatch.setattr("medrl.cluster.placement.placement_group_table", self._table)
        monkeypatch.setattr("medrl.cluster.placement.remove_placement_group", self.removed.append)
        monkeypatch.setattr("medrl.cluster.placement.LOOK_S", 0.001)
        monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.1")

    def _ask(self, bundles: list[dict[str, float]]) -> str:
        name = f"group {len(self.groups)}"
        self.groups[name] = [True] * len(bundles)
        return name

    def _table(self, group: str) -> dict[str, Any]:
        nodes = self.groups[group]
        return {
            "state": "CREATED" if all(nodes) else "RESCHEDULING",
            "bundles_to_node_id": {i: "a node" if there else "" for i, there in enumerate(nodes)},
        }


async def look(placement: Placement) -> None:
    """As often as it takes: some hundred times."""
    looking = asyncio.create_task(placement.yield_room())
    await asyncio.sleep(0.3)
    looking.cancel()


async def placed_with_two_further_engines() -> Placement:
    config = PlacementConfig(engines="1..3", learners=1)
    placement = Placement("cpu", config, "first", rank_threads=1, engine_threads=1)  # type: ignore[arg-type]
    placement.ranks_placed.set()
    for index in range(3):
        await placement.engine_options(index)
    assert list(placement.further) == [1, 2]
    return placement


async def test_each_engine_beyond_the_fewest_has_a_group_of_its_own_until_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeRay(monkeypatch, True, True)
    placement = await placed_with_two_further_engines()
    await placement.engine_options(2)  # started again: where it was, if that is still there
    await look(placement)
    assert not fake.removed
    placement.remove()
    assert fake.removed == list(fake.groups) == ["first", "group 1", "group 2"]


async def test_further_engines_make_room_for_a_rank_but_not_for_another_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeRay(monkeypatch, True, False)
    placement = await placed_with_two_further_engines()
    await look(placement)
    assert not fake.removed
    fake.groups["first"] = [False, True]
    await look(placement)
    assert fake.removed == ["group 2", "group 1"]
    again = asyncio.create_task(placement.engine_options(1))
    await asyncio.sleep(0.01)
    assert not again.done()  # nothing new is asked for before the rank has its room
    fake.groups["first"] = [True, True]
    await look(placement)
    await again
    assert list(placement.further) == [1]


async def test_only_what_has_no_node_is_said_to_lack_room(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch, True, True)
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0})
    placement = await placed_with_two_further_engines()
    assert [placement.lacking(index) for index in range(3)] == ["", "", ""]
    fake.groups["first"] = [False, False]
    fake.groups["group 2"] = [False]
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 0.0})
    assert placement.lacking(0) == "asked for 2 CPUs, the cluster has 0 free of 4"
    assert placement.lacking(1) == ""
    assert placement.lacking(2) == "asked for 1 CPUs, the cluster has 0 free of 4"


@pytest.mark.parametrize(
    ("free", "said"),
    [
        ({"GPU": 6.0, "CPU": 64.0}, "asked for 8 GPUs, the cluster has 6 free of 8; lower"),
        ({"GPU": 8.0, "CPU": 64.0}, "free, but scattered"),
        ({}, "asked for 8 CPUs, the cluster has 0 free of 64; asked for 8 GPUs"),
    ],
)
def test_what_is_missing_is_said_in_numbers(free: dict[str, float], said: str) -> None:
    bundles = needed_bundles(PlacementConfig(engines=4, learners=4), "gpu")
    assert said in missing(bundles, free, {"GPU": 8.0, "CPU": 64.0})
