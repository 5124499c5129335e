"""A run whose engines and learner are fakes: what is left is the driver's own work."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from medrl.actors.buffer import GroupBuffer
from medrl.actors.fake_engine import FakeEngine, FakeWire
from medrl.actors.pool import EnginePool
from medrl.actors.sampler import Sampler
from medrl.actors.types import Prompt, ScoredGroup, UpdateMetrics
from medrl.cluster.engines import MAX_SEQUENCES
from medrl.cluster.journal import Journal
from medrl.cluster.loop import Parts, train
from medrl.cluster.requests import Requests
from medrl.cluster.sync import Sync
from medrl.configs.schema import RolloutConfig
from medrl.data.schedule import Schedule
from medrl.learner.fake_learner import FakeLearner
from medrl.rewards.modes import get_mode
from medrl.rewards.scorer import Scorer

MODE = "no-think"
COMPLETIONS = 8
_TIMEOUT_S = 60.0

PROMPTS = [
    Prompt(
        id=f"p{index}",
        question="Which modality is this?",
        options=("CT", "MRI", "X-ray", "OCT"),
        answer="ABCD"[index % 4],
        images=(f"{index}.png",),
        modality="CT",
        question_type="Modality Recognition",
        source="bench",
    )
    for index in range(256)
]


class SleepingLearner(FakeLearner):
    """Takes `seconds` for an update, and keeps the norm of each gradient."""

    def __init__(self, wire: FakeWire, seconds: float) -> None:
        super().__init__(wire, skill=0.5, learning_rate=1e-3)
        self._seconds = seconds
        self.norms: list[float] = []

    async def update(self, batch: Sequence[ScoredGroup]) -> UpdateMetrics:
        await asyncio.sleep(self._seconds)
        done = await super().update(batch)
        self.norms.append(done.gradient_norm)
        return done


class FakeRun:
    """A whole run of THE loop, real but for what it waits for."""

    def __init__(
        self,
        folder: Path,
        scorer: Scorer,
        *,
        prompts: int,
        steps: int,
        staleness: int = 0,
        engines: int = 2,
        group_seconds: float = 0.0,
        at_once: int = MAX_SEQUENCES // COMPLETIONS,
        learn_seconds: float = 0.0,
    ) -> None:
        """`group_seconds`: of a group, of which an engine works on `at_once` side by side."""
        wire = FakeWire()
        requests = Requests(
            prompts=PROMPTS,
            schedule=Schedule(len(PROMPTS), seed=0),
            mode=get_mode(MODE),
            rollout=RolloutConfig(
                prompts=prompts, completions=COMPLETIONS, max_tokens=32, staleness=staleness
            ),
            seed=0,
        )
        pool = EnginePool()
        for index in range(engines):
            pool.add(index, FakeEngine(wire, index=index, seconds=group_seconds))
        self.learner = SleepingLearner(wire, learn_seconds)
        self.journal = Journal(folder)
        self._sync = Sync(
            pool=pool,
            learner=self.learner,
            transport="gloo",
            canary=requests.canary(),
            max_gap=1e-4,
            timeout_s=_TIMEOUT_S,
        )
        self._parts = Parts(
            request=requests.train,
            sampler=Sampler(pool, max_sequences=at_once * COMPLETIONS, timeout_s=_TIMEOUT_S),
            scorer=scorer,
            buffer=GroupBuffer(prompts=prompts, staleness=staleness, total_batches=steps),
            learner=self.learner,
            sync=self._sync,
            journal=self.journal,
            after_step=self.after_step,
            max_failed_fraction=0.0,
        )

    async def after_step(self, step: int) -> None:
        """Override to look at the run."""

    async def run(self) -> None:
        await self._sync.push(version=0, step=0)
        self.journal.begin_step()
        self._parts.sampler.take_idle_seconds()
        await train(self._parts)
