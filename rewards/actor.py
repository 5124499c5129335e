"""The Ray shell around the pool, and the scorer that stands for it on the driver."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from medrl.actors.actor import death
from medrl.actors.heartbeat import Hangs, answer
from medrl.actors.pool import MAX_DEATHS, Outage
from medrl.actors.types import Group, Prompt, Score, ScoredGroup
from medrl.configs.errors import MedrlError, RewardError, as_death
from medrl.configs.schema import RewardConfig
from medrl.rewards.overlong import punish_overlong
from medrl.rewards.pool import RewardPool
from medrl.rewards.scorer import score_group

_START_S = 120.0  # for the actor to be up, its pool included


class RewardActor:
    """A RewardPool as a Ray actor. It dies with its pool: workers follow their parent."""

    def __init__(self, config: RewardConfig, mode: str, mark: str = "") -> None:
        self._pool = RewardPool(
            config.terms, mode, config.processes, config.timeout_s, policy=config.policy, mark=mark
        )

    async def ping(self) -> None:
        """Answer, also while scores are awaited."""

    async def score(self, prompt: Prompt, completions: Sequence[str]) -> tuple[Score, ...]:
        return await self._pool.score(prompt, completions)

    async def close(self) -> None:
        self._pool.close()


class RayScorer:
    """Scores groups in a RewardActor; only prompt and texts travel, not tokens and log-probs.

    An actor that dies or hangs is started again, and what it was asked is asked again: scoring
    twice does no harm.
    """

    def __init__(
        self,
        config: RewardConfig,
        mode: str,
        heartbeat_s: float = 60.0,
        *,
        owner: str = "",
        **options: Any,
    ) -> None:
        """Start the actor. `options` are Ray's, such as num_cpus (default 0: it mostly waits).
        While a group is scored, the actor answers a ping within `heartbeat_s`. `owner`: whoever had
        rewards under this name before is gone, and what those left running is ended."""
        # A mark of all that rewards start, and may leave where an actor dies.
        mark = uuid.uuid5(uuid.NAMESPACE_URL, owner).hex if owner else uuid.uuid4().hex
        kind = ray.remote(RewardActor).options(**({"num_cpus": 0} | options))
        self.tell: Callable[[Outage], None] = lambda outage: None
        self._overlong_tokens = config.overlong_tokens
        self._heartbeat_s = heartbeat_s
        self._make: Callable[[], Any] = lambda: kind.remote(config, mode, mark)
        self._left: tuple[float, str] | None = None  # when (monotonic) and why, until it is back
        self._closed = False
        self._start()

    async def score_group(self, group: Group) -> ScoredGroup:
        """Score a group. Raises RewardError where the actor dies of it over and over."""
        scored = await score_group(self._score, group)
        if self._overlong_tokens:
            return punish_overlong(scored, self._overlong_tokens)
        return scored

    async def close(self) -> None:
        """End the actor and its processes. Safe to call twice."""
        self._closed = True
        try:
            with contextlib.suppress(RayError):  # it is gone already
                await self._actor.close.remote()
        finally:  # it may hang
            ray.kill(self._actor)

    def _start(self) -> None:
        self._actor = self._make()
        self._up = self._actor.ping.remote()  # done once the pool is whole

    async def _score(self, prompt: Prompt, completions: Sequence[str]) -> tuple[Score, ...]:
        deaths: list[RewardError] = []
        while len(deaths) < MAX_DEATHS:
            actor = self._actor
            try:
                scores = await self._ask(actor, prompt, completions)
            except RewardError as error:
                if not error.died or self._closed:
                    raise
                deaths.append(error)
                self._replace(actor, error)
                continue
            self._is_back(actor)
            return scores
        cause = str(deaths[0]).partition("\n")[0]
        self._tell("given up", cause)
        raise RewardError(
            f"{cause}\nthe reward actor died {MAX_DEATHS} times over the completions of prompt "
            f"{prompt.id}; the checkpoint is there to go on from (--resume)"
        )

    async def _ask(
        self, actor: Any, prompt: Prompt, completions: Sequence[str]
    ) -> tuple[Score, ...]:
        """One try. Raises RewardError, `died` where the actor is gone or hangs."""
        try:
            async with asyncio.timeout(_START_S):
                await self._up
            call = actor.score.remote(prompt, completions)
            scores: tuple[Score, ...] = await answer(call, actor.ping.remote, self._heartbeat_s)
        except RayTaskError as error:
            if isinstance(error.cause, MedrlError):
                raise error.cause from None
            raise RewardError(f"the reward actor failed: {error.cause}") from error
        except RayActorError as error:
            raise as_death(RewardError(f"the reward actor died: {death(error)}")) from error
        except RayError as error:
            raise as_death(RewardError(f"the reward actor failed: {error}")) from error
        except Hangs as error:
            raise as_death(RewardError(f"the reward actor {error}")) from None
        except TimeoutError:
            text = f"the reward actor was not up within {_START_S:g} s"
            raise as_death(RewardError(text)) from None
        return scores

    def _replace(self, actor: Any, error: RewardError) -> None:
        """Start another in its place, unless another group has."""
        if actor is not self._actor:
            return
        cause = str(error).partition("\n")[0]
        if self._left is None:
            self._tell("left", cause)
            self._left = time.monotonic(), cause
        ray.kill(actor)
        self._start()

    def _is_back(self, actor: Any) -> None:
        if self._left and actor is self._actor:
            cause = self._left[1]
            self._tell("returned", cause)
            self._left = None

    def _tell(self, event: Literal["left", "returned", "given up"], cause: str) -> None:
        out_s = time.monotonic() - self._left[0] if self._left else 0.0
        self.tell(Outage(who="rewards", event=event, cause=cause, seconds=out_s))
