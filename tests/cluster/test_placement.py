"""What a run needs of a cluster, and the sentence that says what is missing."""

import pytest

from medrl.cluster.placement import missing, needed_bundles, wanted
from medrl.configs.schema import PlacementConfig


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
