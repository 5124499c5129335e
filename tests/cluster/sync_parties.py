"""The two parties of a sync, in plain Python: they write down how they are called."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medrl.actors.pool import EnginePool, Outage
from medrl.actors.types import (
    Completion,
    Group,
    Prompt,
    RolloutRequest,
    Sampling,
    Sent,
    SyncPlan,
    WeightMeta,
)
from medrl.cluster.sync import Sync

WEIGHTS = (
    WeightMeta(name="embed", dtype="float32", shape=(4, 2)),
    WeightMeta(name="head", dtype="float32", shape=(4,)),
)
DIGESTS = {"embed": "aa", "head": "bb"}
PROMPT = Prompt(
    id="canary",
    question="?",
    options=(),
    answer="a",
    images=(),
    modality="",
    question_type="",
    source="",
)
CANARY = RolloutRequest(
    draw=0,
    prompt=PROMPT,
    text="?",
    sampling=Sampling(num_completions=1, max_tokens=2, temperature=0),
    seed=0,
)


@dataclass
class Journal:
    """Who was called, in order, by both sides."""

    calls: list[str] = field(default_factory=list)


class Engine:
    """Obeys the protocol and writes down its calls; `faults` maps a method to what it does."""

    def __init__(self, name: str, journal: Journal) -> None:
        self.name, self.journal = name, journal
        self.faults: dict[str, Any] = {}
        self.digests: Mapping[str, str] = DIGESTS
        self.logprob = -1.0
        self.says = (1, 2)
        self.rank = 0
        self.version: int | None = None

    async def _call(self, method: str) -> None:
        self.journal.calls.append(f"{self.name}.{method}")
        await asyncio.sleep(0)
        fault = self.faults.get(method)
        if isinstance(fault, Exception):
            raise fault
        if fault == "hang":
            await asyncio.Event().wait()

    async def ping(self) -> None:
        await self._call("ping")

    async def pause(self) -> None:
        await self._call("pause")
        self.version = None

    async def open_transfer(self, plan: SyncPlan, rank: int) -> None:
        await self._call("open")
        self.rank, self.plan = rank, plan

    async def receive(self, weights: Sequence[WeightMeta]) -> Mapping[str, str]:
        await self._call("receive")
        assert tuple(weights) == WEIGHTS
        return self.digests

    async def canary(self, request: RolloutRequest) -> Group:
        await self._call("canary")
        completion = Completion(
            token_ids=self.says,
            logprobs=(-1.0, self.logprob),
            text="",
            finish_reason="length",
            version=0,
        )
        return Group(
            request=request,
            prompt_token_ids=(1,),
            image_hashes=(),
            completions=(completion,),
            engine=0,
            seconds=0,
        )

    async def resume(self, version: int) -> None:
        await self._call("resume")
        self.version = version

    async def generate(self, request: RolloutRequest) -> Group:
        raise AssertionError("a sync generates nothing but canaries")

    async def close(self) -> None: ...


class Learner:
    """The half of the protocol that a sync uses. Its calls must never overlap."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.faults: dict[str, Any] = {}
        self.busy = False

    async def _call(self, method: str) -> None:
        assert not self.busy, f"{method} while another call runs"
        self.busy = True
        self.journal.calls.append(f"learner.{method}")
        await asyncio.sleep(0)
        self.busy = False
        if fault := self.faults.get(method):
            raise fault

    async def logprobs(self, group: Group) -> tuple[tuple[float, ...], ...]:
        await self._call("logprobs")
        return ((-1.0, -1.0),)

    async def weights(self) -> tuple[WeightMeta, ...]:
        await self._call("weights")
        return WEIGHTS

    async def transfer_address(self) -> tuple[str, int]:
        await self._call("address")
        return "host", 1234

    async def open_transfer(self, plan: SyncPlan) -> None:
        await self._call("open")
        self.plan = plan

    async def send(self) -> Sent:
        await self._call("send")
        return Sent(tensors=2, bytes=48, digests=DIGESTS, seconds=0.1)


class System:
    """A sync of a learner and two engines."""

    def __init__(self, engines: int = 2, **changes: Any) -> None:
        self.journal = Journal()
        self.engines = {index: Engine(f"e{index}", self.journal) for index in range(engines)}
        self.outages: list[Outage] = []
        self.pool = EnginePool(self.outages.append)
        for index, engine in self.engines.items():
            self.pool.add(index, engine)
        self.learner = Learner(self.journal)
        settings: dict[str, Any] = {"transport": "gloo", "max_gap": 1e-4, "timeout_s": 5.0}
        self.sync = Sync(
            pool=self.pool,
            learner=self.learner,  # type: ignore[arg-type]
            canary=CANARY,
            **(settings | changes),
        )

    def serving(self) -> list[int | None]:
        """The version each engine serves; the pool agrees."""
        assert set(self.pool.serving) == {
            i for i, engine in self.engines.items() if engine.version is not None
        } & set(self.pool.up)
        return [engine.version for engine in self.engines.values()]
