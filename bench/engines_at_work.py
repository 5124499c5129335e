"""Real engines, each a Ray actor as in a run, with vLLM's own statistics switched on and kept."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray

from medrl.actors.actor import EngineActor, RayEngine
from medrl.cluster.closing import close_all
from medrl.cluster.loopback import ENVIRONMENT
from medrl.cluster.placement import cluster
from medrl.cluster.quiet import SETTINGS, quiet_libraries
from medrl.configs.schema import ModelConfig, PlacementConfig, RolloutConfig

_START_S = 300.0
_CALL_S, _GROUP_S = 60.0, 120.0
_MAX_PIXELS = 448 * 448


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What vLLM has counted, since the start or of a run."""

    encoded: int = 0  # images its scheduler gave to the vision tower
    prompts: int = 0  # looked up in the prefix cache: one a completion
    hits: int = 0  # tokens of these prompts that were found there, in whole blocks

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            encoded=self.encoded + other.encoded,
            prompts=self.prompts + other.prompts,
            hits=self.hits + other.hits,
        )

    def __sub__(self, other: Counts) -> Counts:
        encoded, prompts, hits = (-value for value in astuple(other))
        return self + Counts(encoded=encoded, prompts=prompts, hits=hits)


class Counter:
    """Adds up what vLLM tells after each step of the model. It obeys vLLM's `StatLoggerBase`."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.block_tokens = 0  # of the prefix cache

    def make(self, vllm_config: Any, engine_index: int) -> Counter:
        """vLLM's `StatLoggerFactory`."""
        self.block_tokens = vllm_config.cache_config.block_size
        return self

    def record(self, scheduler_stats: Any, *others: object, **named: object) -> None:
        if scheduler_stats is None:
            return
        step, cache = scheduler_stats.iteration_details, scheduler_stats.prefix_cache_stats
        self.counts += Counts(
            encoded=step.num_encoder_inputs if step else 0,
            prompts=cache.requests,
            hits=cache.hits,
        )

    def log_engine_initialized(self) -> None:
        """Nothing to do."""

    def log(self) -> None:
        """Nothing to do."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """Nothing to do."""


class CountingActor(EngineActor):
    """The shell of a run's engine, with a counter."""

    async def start(self, settings: Mapping[str, Any]) -> None:
        self._counter = Counter()
        await super().start({**settings, "stat_logger": self._counter.make})

    async def counter(self) -> tuple[Counts, int]:
        return self._counter.counts, self._counter.block_tokens


class CountedEngine(RayEngine):
    """Handle of a `CountingActor`."""

    async def counter(self) -> tuple[Counts, int]:
        """What vLLM has counted since its start, and the tokens of a block of its prefix cache."""
        found: tuple[Counts, int] = await self.answer("count", self._actor.counter.remote, _CALL_S)
        return found

    async def forget(self) -> None:
        """Have its caches empty, as each push of weights leaves them; then serve."""
        await self.pause()
        await self.resume(0)

    async def start(self, settings: Mapping[str, Any]) -> None:
        """Returns when it is up; it serves after `forget`."""
        await self.answer("start", self._actor.start.remote, _START_S, settings)


@contextmanager
def engines_at_work(
    number: int, model: Path, images: Path, rollout: RolloutConfig
) -> Iterator[tuple[asyncio.Runner, list[CountedEngine]]]:
    """`number` engines on the CPU, a thread each, and the event loop to ask them from. `images`:
    the folder that paths of images are relative to."""
    with (
        TemporaryDirectory(prefix="medrl-") as folder,
        quiet_libraries(),
        cluster(PlacementConfig()),
        asyncio.Runner() as runner,
    ):
        environment = {**SETTINGS, **ENVIRONMENT, "OMP_NUM_THREADS": "1"}
        shell = ray.remote(CountingActor).options(num_cpus=0, runtime_env={"env_vars": environment})
        engines = [
            CountedEngine(shell.remote(), index, _GROUP_S, _CALL_S) for index in range(number)
        ]

        async def start() -> None:
            await asyncio.gather(*(engine.start(settings(engine.index)) for engine in engines))

        def settings(index: int) -> dict[str, Any]:
            return {
                "model": ModelConfig(path=str(model.absolute())),
                "rollout": rollout,
                "max_pixels": _MAX_PIXELS,
                "image_root": images.absolute(),
                "index": index,
                "device": "cpu",
                "seed": 0,
                "transport": "gloo",
                "scratch": Path(folder) / str(index),
            }

        try:
            runner.run(start())
            yield runner, engines
        finally:
            runner.run(close_all(engines))
