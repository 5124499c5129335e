"""What runs where: a Ray cluster, and in it one placement group for engines and learner ranks.

Learner ranks come first and bundles are packed, so ranks share a node as far as they fit. The
group is asked for with a deadline, past which the error says what is missing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from medrl.cluster.loopback import ADDRESS, ENVIRONMENT, ray_on_loopback
from medrl.cluster.quiet import silence_ray
from medrl.configs.errors import PlacementError
from medrl.configs.schema import PlacementConfig

OBJECT_STORE_BYTES = 256 * 2**20  # of a local cluster: only ids and numbers travel
POLL_S = 0.2
GRACE_S = 3.0  # for a local cluster's processes to end by themselves


@dataclass(frozen=True, slots=True)
class Placement:
    """Where this run's processes go: Ray options for each of them."""

    device: Literal["cpu", "gpu"]
    config: PlacementConfig
    group: PlacementGroup
    threads: int  # compute threads of a process on the CPU

    def rank_options(self, rank: int) -> dict[str, Any]:
        return self._options(rank, gpus=0.5 if self.config.colocate else 1)

    def engine_options(self, index: int) -> dict[str, Any]:
        if self.config.colocate:
            return self._options(index, gpus=0.5)
        return self._options(self.config.learners + index, gpus=self.config.gpus_per_engine)

    def reward_options(self) -> dict[str, Any]:
        """Outside the group: rewards need no GPU, and Ray may put them where there is room."""
        return {"num_cpus": 0, "runtime_env": {"env_vars": self._environment()}}

    def _options(self, bundle: int, gpus: float) -> dict[str, Any]:
        return {
            "num_cpus": self.config.cpus_per_process,
            "num_gpus": gpus if self.device == "gpu" else 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self.group, placement_group_bundle_index=bundle
            ),
            "runtime_env": {"env_vars": self._environment()},
        }

    def _environment(self) -> dict[str, str]:
        threads = {"OMP_NUM_THREADS": str(self.threads)} if self.device == "cpu" else {}
        local = ENVIRONMENT if ray.util.get_node_ip_address() == ADDRESS else {}
        quiet = {"TOKENIZERS_PARALLELISM": "false", "RAY_DISABLE_USAGE_STATS": "1"}
        return threads | local | quiet


@contextmanager
def cluster(config: PlacementConfig) -> Iterator[None]:
    """A Ray cluster: the one at `config.address`, the one this job runs in, or a local one.

    A local one ends with the block. Raises `PlacementError` where a named one does not answer.
    """
    os.environ.setdefault("RAY_DISABLE_USAGE_STATS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    others = set(psutil.Process().children(recursive=True))
    try:
        _connect(address)
        yield
    finally:
        family = set() if address else set(psutil.Process().children(recursive=True)) - others
        ray.shutdown()
        _end(family)


def _connect(address: str) -> None:
    common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not address:
        common |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        with nullcontext() if address else ray_on_loopback():
            ray.init(address=address or "local", **common)
        silence_ray()
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise PlacementError(
            f"no Ray cluster at {address or 'this machine'}: {error}; check placement.address, or "
            "leave it empty for a local one"
        ) from None


def _end(family: Iterable[psutil.Process]) -> None:
    """Wait for a local cluster's processes to be gone; they are asked to end, not made to."""
    _, alive = psutil.wait_procs(family, timeout=GRACE_S)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=GRACE_S)


@asynccontextmanager
async def placed(config: PlacementConfig) -> AsyncIterator[Placement]:
    """Hold the run's resources for the block. Raises `PlacementError` past the deadline."""
    device = choose_device(config)
    bundles = needed_bundles(config, device)
    group = await _claim(config, bundles)
    try:
        cores = os.cpu_count() or 1
        sharing = max(config.engines, config.learners)  # the two kinds mostly take turns
        yield Placement(device, config, group, threads=max(1, cores // sharing))
    finally:
        remove_placement_group(group)


def choose_device(config: PlacementConfig) -> Literal["cpu", "gpu"]:
    """`config.device`, where "auto" is gpu on a cluster that has any."""
    if config.device != "auto":
        return config.device
    return "gpu" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"


def needed_bundles(config: PlacementConfig, device: str) -> list[dict[str, float]]:
    """A bundle a process: ranks, then engines; a shared bundle a pair where they are colocated."""
    cpus, on_gpu = config.cpus_per_process, device == "gpu"
    if config.colocate:
        shared = {"CPU": 2 * cpus, **({"GPU": 1.0} if on_gpu else {})}
        return [shared] * config.learners
    rank = {"CPU": cpus, **({"GPU": 1.0} if on_gpu else {})}
    engine = {"CPU": cpus, **({"GPU": float(config.gpus_per_engine)} if on_gpu else {})}
    return [rank] * config.learners + [engine] * config.engines


async def _claim(config: PlacementConfig, bundles: list[dict[str, float]]) -> PlacementGroup:
    # A local cluster never grows: what it lacks in all, waiting does not bring.
    hopeless = not config.address and "RAY_ADDRESS" not in os.environ and _lacks(bundles)
    group = placement_group(bundles, strategy="PACK")
    ready = group.ready()
    deadline = time.monotonic() + (0 if hopeless else config.deadline_s)
    try:
        while not ray.wait([ready], timeout=0)[0]:
            if time.monotonic() > deadline:
                sentence = missing(bundles, ray.available_resources(), ray.cluster_resources())
                waited = "" if hopeless else f" (waited {config.deadline_s:g} s, deadline_s)"
                raise PlacementError(f"{sentence}{waited}")
            await asyncio.sleep(POLL_S)
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def _lacks(bundles: list[dict[str, float]]) -> bool:
    total = ray.cluster_resources()
    return any(amount > total.get(kind, 0) for kind, amount in wanted(bundles).items())


def wanted(bundles: list[dict[str, float]]) -> dict[str, float]:
    """Sum of the bundles by resource."""
    kinds = sorted({kind for bundle in bundles for kind in bundle})
    return {kind: round(sum(b.get(kind, 0) for b in bundles), 6) for kind in kinds}


def missing(
    bundles: list[dict[str, float]], free: dict[str, float], total: dict[str, float]
) -> str:
    """A sentence that says what was asked for, what there is, and what to change."""
    ask = wanted(bundles)
    parts = [
        f"asked for {amount:g} {kind}s, the cluster has {free.get(kind, 0):g} free of "
        f"{total.get(kind, 0):g}"
        for kind, amount in ask.items()
        if amount > free.get(kind, 0)
    ]
    advice = {
        "GPU": "lower placement.engines or placement.learners, or add nodes",
        "CPU": "lower placement.cpus_per_process, placement.engines or placement.learners",
    }
    lacking = [kind for kind, amount in ask.items() if amount > free.get(kind, 0)]
    if not lacking:
        return f"no placement for {len(bundles)} bundles of {bundles[0]}: free, but scattered"
    return f"{'; '.join(parts)}; {advice['GPU' if 'GPU' in lacking else 'CPU']}"
