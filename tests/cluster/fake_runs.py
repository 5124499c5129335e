"""Whole runs of the real loop with an engine and a learner in plain Python."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow.parquet as pq
from builders import make_prompt, make_request, pool_of

from medrl.actors.buffer import GroupBuffer
from medrl.actors.fake_engine import FakeEngine, FakeWire
from medrl.actors.sampler import Sampler
from medrl.actors.types import (
    Group,
    RolloutRequest,
    ScoredGroup,
)
from medrl.cluster.journal import Journal
from medrl.cluster.loop import Parts, train
from medrl.cluster.requests import Requests
from medrl.cluster.sync import Sync
from medrl.configs.schema import RewardTerm, RolloutConfig
from medrl.data.schedule import Schedule
from medrl.learner.fake_learner import FakeLearner
from medrl.rewards.compose import build_rewards
from medrl.rewards.modes import get_mode

REWARDS = build_rewards((RewardTerm(use="format"), RewardTerm(use="accuracy")), "no-think")
PROMPTS = [make_prompt(f"p{i}", answer="AB"[i % 2]) for i in range(10)]


class Scorer:
    """The real rewards, in this process; optionally dealt to the wrong completions."""

    def __init__(self, *, shuffled: bool = False) -> None:
        self._rng = random.Random(0) if shuffled else None

    async def score_group(self, group: Group) -> ScoredGroup:
        prompt = group.request.prompt
        scores = [REWARDS.score(prompt, completion.text) for completion in group.completions]
        if self._rng:
            self._rng.shuffle(scores)
        return ScoredGroup(group=group, scores=tuple(scores), seconds=0.0)


class World:
    """A run of fakes in a folder."""

    def __init__(
        self,
        folder: Path,
        *,
        steps: int,
        staleness: int = 0,
        max_replaced: int = 0,
        scorer: object = None,
        skill: float = 0.3,
        delays: tuple[float, ...] = (0.0, 0.0),
        kind: type[FakeEngine] = FakeEngine,
    ) -> None:
        wire = FakeWire()
        rollout = RolloutConfig(prompts=4, completions=4, max_tokens=32, staleness=staleness)
        self.requests = Requests(
            prompts=PROMPTS,
            schedule=Schedule(len(PROMPTS), seed=0),
            mode=get_mode("no-think"),
            rollout=rollout,
            seed=0,
        )
        self.learner = FakeLearner(wire, skill=skill, learning_rate=0.1)
        self.wire = wire
        self.engines = {i: kind(wire, index=i, seconds=delay) for i, delay in enumerate(delays)}
        self.pool = pool_of(self.engines.values(), serving=False)
        self.buffer = GroupBuffer(
            prompts=4, staleness=staleness, total_batches=steps, max_replaced=max_replaced
        )
        self.journal = Journal(folder)
        self.sync = Sync(
            pool=self.pool,
            learner=self.learner,
            transport="gloo",
            canary=make_request(0, completions=1, temperature=0.0),
            max_gap=1e-4,
            timeout_s=10.0,
        )
        self.seen: list[int] = []
        self.parts = Parts(
            request=self.request,
            sampler=Sampler(self.pool, max_sequences=8, timeout_s=10),
            scorer=scorer or Scorer(),  # type: ignore[arg-type]
            buffer=self.buffer,
            learner=self.learner,
            sync=self.sync,
            journal=self.journal,
            after_step=self.after_step,
            max_failed_fraction=0.5,
        )

    def request(self, draw: int) -> RolloutRequest:
        self.seen.append(draw)
        return self.requests.train(draw)

    async def after_step(self, step: int) -> None:
        return None

    async def run(self) -> None:
        version = self.buffer.version
        await self.sync.push(version=version, step=version)
        await train(self.parts)


def draws_trained(run: Path) -> list[int]:
    files = sorted((run / "completions").glob("*.parquet"))
    tables = [pq.read_table(file, columns=["draw"]).column("draw") for file in files]
    return sorted(draw for table in tables for draw in table.to_pylist()[::4])
