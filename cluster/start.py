"""Start what a run is made of, all at once, and end it all, however the run ends."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from medrl.actors.actor import RayEngine, create_engine
from medrl.actors.sampler import Sampler
from medrl.cluster.interrupt import Interrupt
from medrl.cluster.placement import Placement
from medrl.cluster.preflight import Checked, reward_terms
from medrl.cluster.requests import Requests
from medrl.cluster.sync import MAX_GAP, Sync
from medrl.configs.schema import Config, ModelConfig
from medrl.learner.actor import RayLearner, create_learner
from medrl.learner.settings import LearnerSettings
from medrl.rewards.actor import RayScorer
from medrl.rewards.scorer import StrictScorer

CLOSE_TIMEOUT_S = 8.0  # of an orderly end; past it processes are killed
MAX_SEQUENCES = 256  # completions an engine works on at once; more wait for whoever is free first

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """Everything a run needs, up and ready."""

    sampler: Sampler
    scorer: RayScorer
    learner: RayLearner
    sync: Sync


@asynccontextmanager
async def system(
    config: Config,
    checked: Checked,
    placement: Placement,
    requests: Requests,
    interrupt: Interrupt,
) -> AsyncIterator[System]:
    """Engines, learner ranks and rewards for the block; they load side by side."""
    started: list[Any] = []
    scratch = _scratch()
    logs = config.run_dir.absolute() / "logs"
    logs.mkdir(exist_ok=True)
    try:
        engines, learner, scorer = await interrupt.cancels(
            _all(
                _engines(config, checked, placement, config.model.path, started, scratch, logs),
                _learner(config, checked, placement, started),
                _scorer(config, placement, started),
            )
        )
        settings = _settings(config, checked, placement)
        yield System(
            sampler=_sampler(config, engines),
            scorer=scorer,
            learner=learner,
            sync=Sync(
                engines=dict(enumerate(engines)),
                learner=learner,
                transport=transport(config, placement.device),
                canary=requests.canary(),
                max_gap=MAX_GAP[settings.dtype],
                timeout_s=config.placement.sync_timeout_s,
                drain_timeout_s=config.rollout.timeout_s,
                workers_per_engine=_workers(config, placement),
            ),
        )
    finally:
        await _close(started, scratch)


@asynccontextmanager
async def engines_and_scorer(
    config: Config, checked: Checked, placement: Placement, model: str, interrupt: Interrupt
) -> AsyncIterator[tuple[Sampler, StrictScorer]]:
    """What an evaluation needs; the engines serve `model` as it lies on disk."""
    started: list[Any] = []
    scratch = _scratch()
    try:
        engines = await interrupt.cancels(
            _engines(config, checked, placement, model, started, scratch, None)
        )
        for engine in engines:
            await engine.resume(0)
        yield _sampler(config, engines), StrictScorer(config.data.mode)
    finally:
        await _close(started, scratch)


def transport(config: Config, device: str) -> Literal["gloo", "nccl", "ipc"]:
    """`placement.transport`, where "auto" follows the device and colocation."""
    if config.placement.transport != "auto":
        return config.placement.transport
    if device == "cpu":
        return "gloo"
    return "ipc" if config.placement.colocate else "nccl"


def local_path(path: str) -> str:
    """Absolute where it is a path here: actors may have another working directory."""
    return str(Path(path).absolute()) if Path(path).exists() else path


async def _engines(
    config: Config,
    checked: Checked,
    placement: Placement,
    model: str,
    started: list[Any],
    scratch: Path,
    logs: Path | None,
) -> list[RayEngine]:
    async def one(index: int) -> RayEngine:
        return await create_engine(
            options=placement.engine_options(index),
            on_created=started.append,
            timeout_s=config.placement.start_timeout_s,
            call_timeout_s=config.placement.sync_timeout_s,
            model=_model(config, model),
            rollout=config.rollout,
            max_pixels=config.data.max_pixels,
            image_root=checked.image_root.absolute(),
            index=index,
            device=placement.device,
            seed=config.run.seed,
            transport=transport(config, placement.device),
            max_images=checked.max_images,
            workers=_workers(config, placement),
            colocated=config.placement.colocate,
            scratch=scratch / str(index),
            log_path=logs / f"engine_{index}.log" if logs else None,
        )

    return list(await asyncio.gather(*(one(i) for i in range(config.placement.engines))))


async def _learner(
    config: Config, checked: Checked, placement: Placement, started: list[Any]
) -> RayLearner:
    learner = await create_learner(
        _settings(config, checked, placement),
        world=config.placement.learners,
        options_for_rank=placement.rank_options,
        timeout_s=config.placement.start_timeout_s,
    )
    started.append(learner)
    return learner


async def _scorer(config: Config, placement: Placement, started: list[Any]) -> RayScorer:
    rewards = config.reward.model_copy(update={"terms": reward_terms(config)})
    scorer = RayScorer(rewards, config.data.mode, **placement.reward_options())
    started.append(scorer)
    return scorer


def _settings(config: Config, checked: Checked, placement: Placement) -> LearnerSettings:
    return LearnerSettings(
        model=_model(config, config.model.path),
        learner=config.learner,
        image_root=checked.image_root.absolute(),
        max_pixels=config.data.max_pixels,
        max_tokens=config.rollout.max_tokens,
        total_steps=config.run.steps,
        seed=config.run.seed,
        device=placement.device,
        collective_timeout_s=config.placement.sync_timeout_s,
    )


def _model(config: Config, path: str) -> ModelConfig:
    return config.model.model_copy(update={"path": local_path(path)})


def _sampler(config: Config, engines: list[RayEngine]) -> Sampler:
    # A stale group may be asked of an engine that is just being synced, and waits for that first.
    wait = config.placement.sync_timeout_s if config.rollout.staleness else 0.0
    timeout_s = config.rollout.timeout_s + wait
    return Sampler(engines, max_sequences=MAX_SEQUENCES, timeout_s=timeout_s)


def _workers(config: Config, placement: Placement) -> int:
    return config.placement.gpus_per_engine if placement.device == "gpu" else 1


async def _all(*starting: Awaitable[Any]) -> list[Any]:
    """Start side by side; the first failure ends the others."""
    tasks = [asyncio.ensure_future(one) for one in starting]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _scratch() -> Path:
    """A short path of this run's own: Unix sockets lie in it."""
    return Path(tempfile.gettempdir()) / f"medrl-{uuid4().hex[:12]}"


async def _close(started: list[Any], scratch: Path) -> None:
    """End everything that was started, failures aside: there is nothing left to save here."""

    async def close(one: Any) -> None:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await one.close()
        except Exception as error:  # a dead actor cannot say goodbye, and need not
            log.debug("closing %s: %s", type(one).__name__, error)

    await asyncio.gather(*(close(one) for one in started))
    shutil.rmtree(scratch, ignore_errors=True)  # an engine that was killed could not
