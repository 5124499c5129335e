"""The rollout pool: sends each group to the engine with the least work.

A group never splits over engines, so its image is encoded and its prompt prefilled once. Groups
beyond what an engine can work on at once wait here, not in its queue: whichever engine is free
first takes the next one, and nothing waits for the slowest engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from medrl.actors.engine import Engine
from medrl.actors.types import Group, RolloutRequest
from medrl.configs.errors import EngineError


class Sampler:
    """N engines behind one `sample`. Measures how long each engine had nothing to do."""

    def __init__(self, engines: Sequence[Engine], *, max_sequences: int, timeout_s: float) -> None:
        """At most `max_sequences` completions in flight an engine; `timeout_s` for a group."""
        self._engines = engines
        self._max_sequences = max_sequences
        self._timeout_s = timeout_s
        self._load = [0] * len(engines)  # completions in flight
        self._idle_since: list[float | None] = [time.monotonic()] * len(engines)
        self._idle_s = 0.0
        self._freed = asyncio.Condition()

    async def sample(self, request: RolloutRequest) -> Group:
        """One group. Raises `UserError` for a prompt too long, `EngineError` for all else."""
        size = request.sampling.num_completions
        async with self._freed:
            await self._freed.wait_for(lambda: self._fits(size))
            index = self._load.index(min(self._load))
            self._begin(index, size)
        try:
            async with asyncio.timeout(self._timeout_s):
                group = await self._engines[index].generate(request)
        except TimeoutError:
            raise EngineError(
                f"engine {index}: no answer to prompt {request.prompt.id} within "
                f"{self._timeout_s:g} s (rollout.timeout_s)"
            ) from None
        finally:
            self._end(index, size)
            async with self._freed:
                self._freed.notify_all()
        if group.request != request:
            raise EngineError(
                f"engine {index}: answered prompt {group.request.prompt.id} (draw "
                f"{group.request.draw}) when asked {request.prompt.id} (draw {request.draw})"
            )
        return group

    def take_idle_seconds(self) -> float:
        """Mean seconds an engine had nothing to do since the last call."""
        now = time.monotonic()
        for index, since in enumerate(self._idle_since):
            if since is not None:
                self._idle_s += now - since
                self._idle_since[index] = now
        idle, self._idle_s = self._idle_s / len(self._engines), 0.0
        return idle

    def _fits(self, size: int) -> bool:
        least = min(self._load)
        return least == 0 or least + size <= self._max_sequences

    def _begin(self, index: int, size: int) -> None:
        since = self._idle_since[index]
        if since is not None:
            self._idle_s += time.monotonic() - since
            self._idle_since[index] = None
        self._load[index] += size

    def _end(self, index: int, size: int) -> None:
        self._load[index] -= size
        if self._load[index] == 0:
            self._idle_since[index] = time.monotonic()
