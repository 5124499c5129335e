"""The Ray shell around the pool, and the scorer that stands for it on the driver."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from medrl.actors.types import Group, Prompt, Score, ScoredGroup
from medrl.configs.errors import RewardError
from medrl.configs.schema import RewardConfig
from medrl.rewards.overlong import punish_overlong
from medrl.rewards.pool import RewardPool
from medrl.rewards.scorer import score_group


class RewardActor:
    """A RewardPool as a Ray actor. It dies with its pool: workers follow their parent."""

    def __init__(self, config: RewardConfig, mode: str) -> None:
        self._pool = RewardPool(
            config.terms, mode, config.processes, config.timeout_s, policy=config.policy
        )

    async def score(self, prompt: Prompt, completions: Sequence[str]) -> tuple[Score, ...]:
        return await self._pool.score(prompt, completions)

    async def close(self) -> None:
        self._pool.close()


class RayScorer:
    """Scores groups in a RewardActor; only prompt and texts travel, not tokens and log-probs.

    Scoring again does no harm, so Ray restarts a lost actor and repeats what was asked of it.
    """

    def __init__(self, config: RewardConfig, mode: str, **options: Any) -> None:
        """Start the actor. `options` are Ray's, such as num_cpus (default 0: it mostly waits)."""
        settings = {"num_cpus": 0, "max_restarts": 3, "max_task_retries": 3} | options
        self._overlong_tokens = config.overlong_tokens
        self._actor = ray.remote(RewardActor).options(**settings).remote(config, mode)

    async def score_group(self, group: Group) -> ScoredGroup:
        """Score a group. Raises RewardError where the actor is lost for good."""
        scored = await score_group(self._score, group)
        if self._overlong_tokens:
            return punish_overlong(scored, self._overlong_tokens)
        return scored

    async def _score(self, prompt: Prompt, completions: Sequence[str]) -> tuple[Score, ...]:
        try:
            scores: tuple[Score, ...] = await self._actor.score.remote(prompt, completions)
        except RayError as error:
            raise RewardError(f"the reward actor failed: {error}") from error
        return scores

    async def close(self) -> None:
        """End the actor and its processes. Safe to call twice."""
        with contextlib.suppress(RayError):  # it is gone already
            await self._actor.close.remote()
        ray.kill(self._actor)
