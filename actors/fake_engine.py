"""An engine in plain Python that obeys the `Engine` protocol, for tests of the loop in a second.

Its model is one number, `skill`: the chance that a completion is the right letter in the asked
tags; where its images are blanked it knows nothing. It refuses what the real engine refuses:
generating before a version was given, receiving while serving, weights that were not announced.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from medrl.actors.types import (
    LETTERS,
    Completion,
    Group,
    RolloutRequest,
    SyncPlan,
    WeightMeta,
)
from medrl.configs.errors import EngineError, WeightSyncError

END_TOKEN = 0
Tensor = tuple[float, ...]


def fake_digest(tensor: Tensor) -> str:
    return repr(tensor)


@dataclass
class FakeWire:
    """The transfer group of fakes: what the learner sends waits here for each engine's rank."""

    mailboxes: dict[int, asyncio.Queue[tuple[str, Tensor]]] = field(default_factory=dict)

    def join(self, rank: int) -> None:
        self.mailboxes[rank] = asyncio.Queue()

    def hang_up(self) -> None:
        """The learner is gone: who waits for a tensor hears so."""
        for mailbox in self.mailboxes.values():
            mailbox.put_nowait(("", ()))


def fake_completion(skill: float, right: str, rng: random.Random, version: int) -> Completion:
    """Right with chance `skill`; its log-prob on the first token, 0 on the others."""
    good = rng.random() < skill
    text = f"<answer>{right}</answer>" if good else rng.choice(("I see it.", "<answer>Z</answer>"))
    token_ids = (*text.encode(), END_TOKEN)
    chance = skill if good else (1 - skill) / 2
    first = math.log(max(chance, 1e-9))
    return Completion(
        token_ids=token_ids,
        logprobs=(first, *[0.0] * (len(token_ids) - 1)),
        text=text,
        finish_reason="stop",
        version=version,
    )


class FakeEngine:
    """Holds `skill`, the learner's only weight."""

    def __init__(self, wire: FakeWire, *, index: int, seconds: float = 0.0) -> None:
        """`seconds`: how long a group takes."""
        self._wire = wire
        self._index = index
        self._seconds = seconds
        self._rank: int | None = None
        self._weights: dict[str, Tensor] = {}
        self._version: int | None = None
        self._running = 0
        self._serving = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def serving(self) -> bool:
        return self._serving.is_set()

    async def generate(self, request: RolloutRequest) -> Group:
        await self._serving.wait()
        self._running += 1
        self._idle.clear()
        try:
            began = time.monotonic()
            await asyncio.sleep(self._seconds)
            return self._group(request, time.monotonic() - began)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def ping(self) -> None:
        await asyncio.sleep(0)

    async def pause(self) -> None:
        self._serving.clear()
        await self._idle.wait()

    async def open_transfer(self, plan: SyncPlan, rank: int) -> None:
        if not 1 <= rank < plan.world_size:
            raise EngineError(f"rank {rank} in a transfer group of {plan.world_size}")
        self._rank = rank
        self._wire.join(rank)

    async def receive(self, weights: Sequence[WeightMeta]) -> Mapping[str, str]:
        if self._serving.is_set() or self._rank is None:
            raise EngineError("receiving needs a paused engine in a transfer group")
        digests = {}
        for meta in weights:
            name, tensor = await self._wire.mailboxes[self._rank].get()
            if not name:
                raise WeightSyncError("connection closed by the learner")
            if (name, (len(tensor),)) != (meta.name, meta.shape):
                raise EngineError(f"got {name} of {len(tensor)}, expected {meta.name} {meta.shape}")
            self._weights[name] = tensor
            digests[name] = fake_digest(tensor)
        return digests

    async def canary(self, request: RolloutRequest) -> Group:
        return self._group(request, 0.0)

    async def resume(self, version: int) -> None:
        if not self._weights:
            raise EngineError("resumed before any weights were received")
        self._version = version
        self._serving.set()

    async def close(self) -> None:
        self._serving.clear()

    def _group(self, request: RolloutRequest, seconds: float) -> Group:
        (skill,) = self._weights["skill"]
        prompt = request.prompt
        right = prompt.answer if prompt.options else LETTERS[0]
        greedy = request.sampling.temperature == 0
        if request.blind and prompt.images:
            skill = 0.0
        completions = tuple(
            fake_completion(
                round(skill) if greedy else skill,
                right,
                random.Random(request.seed + i),
                self._version or 0,
            )
            for i in range(request.sampling.num_completions)
        )
        return Group(
            request=request,
            prompt_token_ids=tuple(request.text.encode()),
            image_hashes=tuple(
                "hash of grey" if request.blind else f"hash of {path}" for path in prompt.images
            ),
            completions=completions,
            engine=self._index,
            seconds=seconds,
        )
