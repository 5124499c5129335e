"""What runs where: a Ray cluster, and in it placement groups for engines and learner ranks.

One group holds what the run cannot start without: learner ranks, then the fewest engines. Bundles
are packed, so ranks share a node as far as they fit. It is asked for with a deadline, past which
the error says what is missing. Each further engine has a group of its own, which nothing waits for.

What was on a node that leaves Ray places anew, as soon as there is room for all that its group has
lost, and before anything new; then actors may be started there. Where ranks have no room, further
engines give theirs up, one after the other.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import psutil
import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from medrl.cluster.loopback import ADDRESS, ENVIRONMENT, ray_on_loopback
from medrl.cluster.quiet import silence_ray
from medrl.configs.errors import PlacementError
from medrl.configs.schema import Config, PlacementConfig

OBJECT_STORE_BYTES = 256 * 2**20  # of a local cluster: only ids and numbers travel
LOOK_S = 5.0  # between two looks at whether all ranks have a node
GRACE_S = 3.0  # for a local cluster's processes to end by themselves


@dataclass(frozen=True, slots=True)
class Placement:
    """Where this run's processes go: Ray options for each of them."""

    device: Literal["cpu", "gpu"]
    config: PlacementConfig
    group: PlacementGroup
    rank_threads: int  # compute threads of a learner rank on CPUs
    engine_threads: int  # of an engine
    further: dict[int, PlacementGroup] = field(default_factory=dict)  # by index of engine
    ranks_placed: asyncio.Event = field(default_factory=asyncio.Event)

    def rank_options(self, rank: int) -> dict[str, Any]:
        gpus = 0.5 if self.config.colocate else 1
        return self._options(self.group, rank, gpus, self.rank_threads)

    async def engine_options(self, index: int) -> dict[str, Any]:
        """A further engine's are there once nothing more important waits for room."""
        gpus = self.config.gpus_per_engine
        if self.config.colocate:
            return self._options(self.group, index, 0.5, self.engine_threads)
        if index < self.config.min_engines:
            bundle = self.config.learners + index
            return self._options(self.group, bundle, gpus, self.engine_threads)
        await self.ranks_placed.wait()
        if index not in self.further:
            self.further[index] = placement_group([_engine_bundle(self.config, self.device)])
        return self._options(self.further[index], 0, gpus, self.engine_threads)

    def lacking(self, index: int) -> str:
        """What there is no room for, where engine `index` has none; else empty."""
        if index < self.config.min_engines:
            homeless = self._homeless()
            number = index if self.config.colocate else self.config.learners + index
            bundles = list(homeless.values()) if number in homeless else []
        else:
            group = self.further.get(index)
            there = group and _is_placed(group)
            bundles = [] if there else [_engine_bundle(self.config, self.device)]
        if not bundles:
            return ""
        return shortage(bundles, ray.available_resources(), ray.cluster_resources())

    async def yield_room(self) -> None:
        """Take room from further engines while a rank has none; endless where there may be any."""
        while self.config.max_engines > self.config.min_engines:
            if not any(rank < self.config.learners for rank in self._homeless()):
                self.ranks_placed.set()
            elif self.ranks_placed.is_set():
                self.ranks_placed.clear()  # Ray may have room for it: look again before taking any
            elif placed := [i for i, group in self.further.items() if _is_placed(group)]:
                remove_placement_group(self.further.pop(max(placed)))
            await asyncio.sleep(LOOK_S)

    def remove(self) -> None:
        """All groups; Ray ends what still runs in them."""
        for group in (self.group, *self.further.values()):
            remove_placement_group(group)

    def _homeless(self) -> dict[int, dict[str, float]]:
        """Bundles of the group that have no node, by number."""
        nodes = placement_group_table(self.group)["bundles_to_node_id"]
        bundles = needed_bundles(self.config, self.device)
        return {i: bundle for i, bundle in enumerate(bundles) if not nodes.get(i)}

    def reward_options(self) -> dict[str, Any]:
        """Outside the group: rewards need no GPU, and Ray may put them where there is room."""
        return {"num_cpus": 0, "runtime_env": {"env_vars": self._environment(self.engine_threads)}}

    def _options(
        self, group: PlacementGroup, bundle: int, gpus: float, threads: int
    ) -> dict[str, Any]:
        return {
            "num_cpus": self.config.cpus_per_process,
            "num_gpus": gpus if self.device == "gpu" else 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=bundle
            ),
            "runtime_env": {"env_vars": self._environment(threads)},
        }

    def _environment(self, threads: int) -> dict[str, str]:
        limit = {"OMP_NUM_THREADS": str(threads)} if self.device == "cpu" else {}
        local = ENVIRONMENT if ray.util.get_node_ip_address() == ADDRESS else {}
        quiet = {"TOKENIZERS_PARALLELISM": "false", "RAY_DISABLE_USAGE_STATS": "1"}
        return limit | local | quiet


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


def threads(config: Config, cores: int) -> tuple[int, int]:
    """Of a rank and of an engine, on CPUs. Ranks and engines take turns at `cores`, unless engines
    sample ahead."""
    if config.run.deterministic:
        return 1, 1  # the last digits of a sum follow from how many threads made it
    ranks, engines = config.placement.learners, config.placement.max_engines
    if config.rollout.staleness:
        ranks = engines = max(ranks, engines)
    return max(1, cores // ranks), max(1, cores // engines)


@asynccontextmanager
async def placed(config: Config) -> AsyncIterator[Placement]:
    """Hold the run's resources for the block. Raises `PlacementError` past the deadline."""
    layout = config.placement
    device = choose_device(layout)
    group = await _claim(layout, needed_bundles(layout, device))
    ranks, engines = threads(config, os.cpu_count() or 1)
    placement = Placement(device, layout, group, rank_threads=ranks, engine_threads=engines)
    yielding = asyncio.create_task(placement.yield_room())
    try:
        yield placement
    finally:
        yielding.cancel()
        await asyncio.gather(yielding, return_exceptions=True)
        placement.remove()


def _is_placed(group: PlacementGroup) -> bool:
    return bool(placement_group_table(group)["state"] == "CREATED")


def choose_device(config: PlacementConfig) -> Literal["cpu", "gpu"]:
    """`config.device`, where "auto" is gpu on a cluster that has any."""
    if config.device != "auto":
        return config.device
    return "gpu" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"


def needed_bundles(config: PlacementConfig, device: str) -> list[dict[str, float]]:
    """A bundle a process: ranks, then the fewest engines; a shared bundle a pair where they are
    colocated."""
    cpus = config.cpus_per_process
    if config.colocate:
        return [_bundle(2 * cpus, 1, device)] * config.learners
    engines = [_engine_bundle(config, device)] * config.min_engines
    return [_bundle(cpus, 1, device)] * config.learners + engines


def _engine_bundle(config: PlacementConfig, device: str) -> dict[str, float]:
    return _bundle(config.cpus_per_process, config.gpus_per_engine, device)


def _bundle(cpus: float, gpus: float, device: str) -> dict[str, float]:
    return {"CPU": cpus} | ({"GPU": float(gpus)} if device == "gpu" else {})


async def _claim(config: PlacementConfig, bundles: list[dict[str, float]]) -> PlacementGroup:
    # A local cluster never grows: what it lacks in all, waiting does not bring.
    hopeless = not config.address and "RAY_ADDRESS" not in os.environ and _lacks(bundles)
    group = placement_group(bundles, strategy="PACK")
    try:
        async with asyncio.timeout(0 if hopeless else config.deadline_s):
            await group.ready()
    except TimeoutError:
        remove_placement_group(group)
        sentence = missing(bundles, ray.available_resources(), ray.cluster_resources())
        waited = "" if hopeless else f" (waited {config.deadline_s:g} s, deadline_s)"
        raise PlacementError(f"{sentence}{waited}") from None
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
    if all(amount <= free.get(kind, 0) for kind, amount in ask.items()):
        return shortage(bundles, free, total)
    if ask.get("GPU", 0) > free.get("GPU", 0):
        advice = "lower placement.engines or placement.learners, or add nodes"
    else:
        advice = "lower placement.cpus_per_process, placement.engines or placement.learners"
    return f"{shortage(bundles, free, total)}; {advice}"


def shortage(
    bundles: list[dict[str, float]], free: dict[str, float], total: dict[str, float]
) -> str:
    """What was asked for, and what there is."""
    parts = [
        f"asked for {amount:g} {kind}s, the cluster has {free.get(kind, 0):g} free of "
        f"{total.get(kind, 0):g}"
        for kind, amount in wanted(bundles).items()
        if amount > free.get(kind, 0)
    ]
    if not parts:
        return f"no placement for {len(bundles)} bundles of {bundles[0]}: free, but scattered"
    return "; ".join(parts)
