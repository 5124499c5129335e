"""Sends each group to the serving engine with the least work, and to another where that one dies.

A group never splits over engines, so its image is encoded and its prompt prefilled once. Groups
beyond what an engine can work on at once wait here, not in its queue: whichever engine is free
first takes the next one, and nothing waits for the slowest engine.

An engine that dies or hangs costs its groups time and nothing else: the same request, with the same
seeds, goes to another engine, or waits until one serves.
"""

from __future__ import annotations

import asyncio
import time

from medrl.actors.engine import Engine
from medrl.actors.pool import EnginePool
from medrl.actors.types import Group, RolloutRequest
from medrl.configs.errors import EngineError, as_death

MAX_DEATHS = 4
"""A group that was with so many engines when they died may be why: it goes to no other."""


class Sampler:
    """A pool of engines behind one `sample`. Measures how long each engine had nothing to do."""

    def __init__(self, pool: EnginePool, *, max_sequences: int, timeout_s: float) -> None:
        """At most `max_sequences` completions in flight an engine; `timeout_s` for a group."""
        self._pool = pool
        self._max_sequences = max_sequences
        self._timeout_s = timeout_s
        self._load: dict[int, int] = {}  # completions in flight, by engine
        self._idle_since = dict.fromkeys(pool.up, time.monotonic())
        self._idle_s = 0.0
        self.first_answer: float | None = None  # when the first group was done; monotonic
        self._queue = asyncio.Lock()  # only the first in it looks for a free engine

    async def sample(self, request: RolloutRequest) -> Group:
        """One group. Raises `UserError` for a prompt too long; `EngineError` for a failure that
        is not an engine's death, for a group engines die with, and where no engine is left."""
        size = request.sampling.num_completions
        deaths: list[EngineError] = []
        while len(deaths) < MAX_DEATHS:
            async with self._queue:
                await self._pool.until(lambda: self._free(size) is not None)
                index = self._free(size)
                assert index is not None
                engine = self._pool.serving[index]
                self._begin(index, size)
            try:
                group = await self._ask(engine, index, request)
            except EngineError as error:
                if not error.died:
                    raise
                self._pool.fail(index, engine, error)
                deaths.append(error)
            else:
                self._pool.answered(index, engine)
                if self.first_answer is None:
                    self.first_answer = time.monotonic()
                return group
            finally:
                self._end(index, size)
        raise EngineError(
            f"{deaths[0]}\n{MAX_DEATHS} engines died with prompt {request.prompt.id} (draw "
            f"{request.draw}): it is asked of no other"
        ) from deaths[0]

    def take_idle_seconds(self) -> float:
        """Mean seconds an engine that is up had nothing to do since the last call."""
        now, up = time.monotonic(), self._pool.up
        # One that left is not idle: it may stay away for long.
        self._idle_since = {i: since for i, since in self._idle_since.items() if i in up}
        for index, since in self._idle_since.items():
            self._idle_s += now - since
            self._idle_since[index] = now
        idle, self._idle_s = self._idle_s / max(1, len(up)), 0.0
        return idle

    async def _ask(self, engine: Engine, index: int, request: RolloutRequest) -> Group:
        try:
            async with asyncio.timeout(self._timeout_s):
                group = await engine.generate(request)
        except TimeoutError:
            raise as_death(
                EngineError(
                    f"engine {index}: no answer to prompt {request.prompt.id} within "
                    f"{self._timeout_s:g} s (rollout.timeout_s)"
                )
            ) from None
        if group.request != request:
            raise EngineError(
                f"engine {index}: answered prompt {group.request.prompt.id} (draw "
                f"{group.request.draw}) when asked {request.prompt.id} (draw {request.draw})"
            )
        return group

    def _free(self, size: int) -> int | None:
        """The serving engine with the least work, where it can take `size` completions more."""
        load, index = min(
            ((self._load.get(i, 0), i) for i in self._pool.serving), default=(0, None)
        )
        return index if load == 0 or load + size <= self._max_sequences else None

    def _begin(self, index: int, size: int) -> None:
        now = time.monotonic()
        self._idle_s += now - self._idle_since.pop(index, now)
        self._load[index] = self._load.get(index, 0) + size

    def _end(self, index: int, size: int) -> None:
        self._load[index] -= size
        if self._load[index] == 0:
            self._idle_since[index] = time.monotonic()
        self._pool.changed()
