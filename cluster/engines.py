"""The engines of a run, started side by side and kept alive; and what else follows from the config.

Where several runs share them (an experiment), they outlive each run.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Literal
from uuid import uuid4

from medrl.actors.actor import RayEngine, create_engine
from medrl.actors.leftovers import clear, clear_all
from medrl.actors.pool import EnginePool
from medrl.actors.sampler import Sampler
from medrl.cluster.closing import close_all
from medrl.cluster.interrupt import Interrupt
from medrl.cluster.placement import Placement
from medrl.cluster.preflight import Checked
from medrl.cluster.supervise import Supervisor
from medrl.configs.errors import EngineError
from medrl.configs.schema import Config, ModelConfig
from medrl.rewards.scorer import StrictScorer

_SCRATCH = re.compile("medrl-[0-9a-f]{12}")
ROOM_S = 10.0  # between two looks at whether an engine that left has room
MAX_SEQUENCES = 256  # completions an engine works on at once; more wait for whoever is free first


class Engines:
    """Starts engines of one kind, and ends all it ever started."""

    def __init__(
        self,
        config: Config,
        checked: Checked,
        placement: Placement,
        model: str,
        logs: Path | None = None,
    ) -> None:
        self._config = config
        self._checked = checked
        self._placement = placement
        self._model = model
        self._logs = logs
        # A short path of this run's own: Unix sockets lie in it.
        self._scratch = Path(tempfile.gettempdir()) / f"medrl-{uuid4().hex[:12]}"
        self._numbers = count()
        self._folders: dict[int, Path] = {}  # of the last engine of an index
        self._started: list[RayEngine] = []
        self._further: dict[int, asyncio.Task[RayEngine]] = {}  # that are being started
        self._waiting: set[int] = set()  # for room
        self.pool = EnginePool()

    async def start(self) -> EnginePool:
        """The fewest there may be, at once; each is stale. Where there is room the others are
        started as well, but not waited for."""
        self._clear_after_a_kill()
        placement = self._config.placement
        for index in range(placement.min_engines, placement.max_engines):
            self._further[index] = asyncio.create_task(self.start_one(index))
        limit = placement.start_timeout_s
        first = (self.start_one(index, limit) for index in range(placement.min_engines))
        for index, engine in enumerate(await asyncio.gather(*first)):
            self.pool.add(index, engine)
        return self.pool

    async def start_one(self, index: int, room_timeout_s: float | None = None) -> RayEngine:
        """Raises `EngineError`, also where it has no room within `room_timeout_s` (None: for ever),
        or is not up placement.start_timeout_s later; then nothing is left of it."""
        begun = len(self._started)
        self._waiting.add(index)
        told = asyncio.create_task(self._say_if_it_waits(index))

        def on_created(engine: RayEngine) -> None:
            self._waiting.discard(index)
            told.cancel()
            self._started.append(engine)

        try:
            return await self._create(index, room_timeout_s, on_created)
        except EngineError:
            await close_all([one for one in self._started[begun:] if one.index == index])
            raise
        finally:
            self._waiting.discard(index)
            told.cancel()

    async def _create(
        self,
        index: int,
        room_timeout_s: float | None,
        on_created: Callable[[RayEngine], object],
    ) -> RayEngine:
        config = self._config
        if index in self._folders:
            clear(self._folders[index])  # one that was killed could not
        # One that is started again does not meet what the one before left.
        self._folders[index] = self._scratch / str(next(self._numbers))
        return await create_engine(
            options=await self._placement.engine_options(index),
            on_created=on_created,
            room_timeout_s=room_timeout_s,
            timeout_s=config.placement.start_timeout_s,
            call_timeout_s=config.placement.sync_timeout_s,
            model=model_at(config, self._model),
            rollout=config.rollout,
            max_pixels=config.data.max_pixels,
            image_root=self._checked.image_root.absolute(),
            index=index,
            device=self._placement.device,
            seed=config.run.seed,
            transport=transport(config, self._placement.device),
            max_images=self._checked.max_images,
            workers=workers(config, self._placement),
            colocated=config.placement.colocate,
            deterministic=config.run.deterministic,
            scratch=self._folders[index],
            log_path=self._logs / f"engine_{index}.log" if self._logs else None,
        )

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Those that die in the block are started again, and those there was no room for."""
        placement = self._config.placement
        supervisor = Supervisor(
            self.pool,
            self._next,
            heartbeat_s=placement.heartbeat_s,
            patience_s=placement.start_timeout_s,
            lacking=self._lacking,
        )
        async with supervisor.watching(range(placement.max_engines)):
            yield

    async def close(self) -> None:
        for task in self._further.values():
            task.cancel()
        await asyncio.gather(*self._further.values(), return_exceptions=True)
        await close_all(self._started)
        clear_all(self._scratch)  # an engine that was killed could not

    async def _next(self, index: int) -> RayEngine:
        begun = self._further.pop(index, None)
        return await (begun or self.start_one(index))

    async def _say_if_it_waits(self, index: int) -> None:
        lacking = ""
        while not lacking:  # Ray may not have noticed yet that its node is gone
            await asyncio.sleep(ROOM_S)
            lacking = self._placement.lacking(index)
        self.pool.waits(index, lacking)

    def _lacking(self) -> str:
        told = {f"engine {i}": self._placement.lacking(i) for i in sorted(self._waiting)}
        return "; ".join(
            f"{who} has no room: {lacking}" for who, lacking in told.items() if lacking
        )

    def _clear_after_a_kill(self) -> None:
        """A run that is resumed deletes what it left on this machine when all of it was killed."""
        if self._logs:
            note = self._logs / "scratch"
            left = Path(note.read_text(encoding="utf-8")) if note.exists() else Path()
            if _SCRATCH.fullmatch(left.name):  # whoever wrote there: no other folder is deleted
                clear_all(left)
            note.write_text(str(self._scratch), encoding="utf-8")


@asynccontextmanager
async def serving_engines(
    config: Config,
    checked: Checked,
    placement: Placement,
    model: str,
    interrupt: Interrupt,
    logs: Path | None = None,
) -> AsyncIterator[EnginePool]:
    """Engines for the block that serve `model` as it lies on disk; those started again, too, until
    a run takes the pool."""
    engines = Engines(config, checked, placement, model, logs)
    try:
        pool = await interrupt.cancels(engines.start())
        for engine in pool.up.values():
            await engine.resume(0)
        pool.serve(pool.up)
        pool.serves_as_started = True
        async with engines.watched():
            yield pool
    finally:
        await engines.close()


@asynccontextmanager
async def engines_and_scorer(
    config: Config, checked: Checked, placement: Placement, model: str, interrupt: Interrupt
) -> AsyncIterator[tuple[Sampler, StrictScorer]]:
    """What an evaluation needs."""
    async with serving_engines(config, checked, placement, model, interrupt) as pool:
        yield make_sampler(config, pool), StrictScorer(config.data.mode)


def make_sampler(config: Config, pool: EnginePool) -> Sampler:
    """One for a run: its deadlines follow from the run's config."""
    # A stale group may be asked of an engine that is just being synced, and waits for that first.
    wait = config.placement.sync_timeout_s if config.rollout.staleness else 0.0
    timeout_s = config.rollout.timeout_s + wait
    at_once = 1 if config.run.deterministic else MAX_SEQUENCES  # 1: a group at a time, of any size
    return Sampler(pool, max_sequences=at_once, timeout_s=timeout_s)


def transport(config: Config, device: str) -> Literal["gloo", "nccl", "ipc"]:
    """`placement.transport`, where "auto" follows the device and colocation."""
    if config.placement.transport != "auto":
        return config.placement.transport
    if device == "cpu":
        return "gloo"
    return "ipc" if config.placement.colocate else "nccl"


def workers(config: Config, placement: Placement) -> int:
    """Of an engine."""
    return config.placement.gpus_per_engine if placement.device == "gpu" else 1


def model_at(config: Config, path: str) -> ModelConfig:
    """The model section, with an absolute path: actors may have another working directory."""
    local = str(Path(path).absolute()) if Path(path).exists() else path
    trusted = local if path == config.model.trust_remote_code else ""  # no checkpoint in its place
    return config.model.model_copy(update={"path": local, "trust_remote_code": trusted})
