"""Start what a run is made of, all at once, and end it all, however the run ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from medrl.actors.pool import EnginePool
from medrl.actors.sampler import Sampler
from medrl.cluster.closing import close_all
from medrl.cluster.engines import Engines, make_sampler, model_at, transport, workers
from medrl.cluster.interrupt import Interrupt
from medrl.cluster.placement import Placement
from medrl.cluster.preflight import Checked, reward_terms
from medrl.cluster.requests import Requests
from medrl.cluster.startup import Startup
from medrl.cluster.sync import MAX_GAP, RANKS_GRACE_S, Sync
from medrl.configs.schema import Config
from medrl.learner.actor import RayLearner, create_learner
from medrl.learner.settings import LearnerSettings
from medrl.rewards.actor import RayScorer


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """Everything a run needs, up and ready."""

    pool: EnginePool
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
    running: EnginePool | None = None,
    startup: Startup | None = None,
) -> AsyncIterator[System]:
    """Engines, learner ranks and rewards for the block; they load side by side.

    `running`: engines that are up, with the same model and limits; they outlive the block.
    `startup`: is told how long each took."""
    watch = startup or Startup()
    started: list[Any] = []
    logs = config.run_dir.absolute() / "logs"
    logs.mkdir(exist_ok=True)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(close_all, started)
        engines = Engines(config, checked, placement, config.model.path, logs)
        stack.push_async_callback(engines.close)
        pool, learner, scorer = await interrupt.cancels(
            _all(
                _there(running) if running else watch.timed("engines", engines.start()),
                watch.timed("learner", _learner(config, checked, placement, started)),
                _scorer(config, placement, started),
            )
        )
        if not running:
            await stack.enter_async_context(engines.watched())
        watch.reached("engines and learner")
        pool.serves_as_started = False
        settings = _settings(config, checked, placement)
        yield System(
            pool=pool,
            sampler=make_sampler(config, pool),
            scorer=scorer,
            learner=learner,
            sync=Sync(
                pool=pool,
                learner=learner,
                transport=transport(config, placement.device),
                canary=requests.canary(),
                max_gap=MAX_GAP[settings.dtype],
                timeout_s=config.placement.sync_timeout_s,
                drain_timeout_s=config.rollout.timeout_s,
                workers_per_engine=workers(config, placement),
            ),
        )


async def _there(pool: EnginePool) -> EnginePool:
    return pool


async def _learner(
    config: Config, checked: Checked, placement: Placement, started: list[Any]
) -> RayLearner:
    learner = await create_learner(
        _settings(config, checked, placement),
        world=config.placement.learners,
        options_for_rank=placement.rank_options,
        timeout_s=config.placement.start_timeout_s,
        heartbeat_s=config.placement.heartbeat_s,
    )
    started.append(learner)
    return learner


async def _scorer(config: Config, placement: Placement, started: list[Any]) -> RayScorer:
    rewards = config.reward.model_copy(update={"terms": reward_terms(config)})
    scorer = RayScorer(
        rewards,
        config.data.mode,
        config.placement.heartbeat_s,
        owner=str(config.run_dir.absolute()),  # one run at a time is in a run directory
        **placement.reward_options(),
    )
    started.append(scorer)
    return scorer


def _settings(config: Config, checked: Checked, placement: Placement) -> LearnerSettings:
    return LearnerSettings(
        model=model_at(config, config.model.path),
        learner=config.learner,
        image_root=checked.image_root.absolute(),
        max_pixels=config.data.max_pixels,
        max_tokens=config.rollout.max_tokens,
        total_steps=config.run.steps,
        seed=config.run.seed,
        device=placement.device,
        collective_timeout_s=config.placement.sync_timeout_s + RANKS_GRACE_S,
        deterministic=config.run.deterministic,
    )


async def _all(*starting: Awaitable[Any]) -> list[Any]:
    """Start side by side; the first failure ends the others."""
    tasks = [asyncio.ensure_future(one) for one in starting]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
