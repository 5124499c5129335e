"""Notice engines that died or hang, also where nobody asks them anything, and start them again.

An engine that serves is pinged: vLLM's own process has to answer, within `heartbeat_s`. One that
left the pool, whoever saw it, is ended with all its processes and started again in its place, in a
crash loop after a while; it is stale until a push. `patience_s` without any engine, or a crash loop
of every one, closes the pool: then whoever waits for an engine gets the first cause.

An engine of the pool that was never up yet is started as well, whenever there is room for it. To
wait for room has no limit and is no death, where others serve.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from medrl.actors.engine import Engine
from medrl.actors.pool import EnginePool
from medrl.configs.errors import EngineError, MedrlError, as_death

POLL_S = 1.0  # between two pings of an engine

log = logging.getLogger(__name__)


class Supervisor:
    """Keeps a pool's engines alive while `watching`."""

    def __init__(
        self,
        pool: EnginePool,
        start: Callable[[int], Awaitable[Engine]],
        *,
        heartbeat_s: float,
        patience_s: float,
        lacking: Callable[[], str] = lambda: "",
    ) -> None:
        """`start`: a new engine of this index, as soon as there is room, or an `EngineError` within
        a time of its own. `lacking`: what room there is not; empty where none is waited for."""
        self._pool = pool
        self._start = start
        self._heartbeat_s = heartbeat_s
        self._patience_s = patience_s
        self._lacking = lacking

    @asynccontextmanager
    async def watching(self, indices: Sequence[int]) -> AsyncIterator[None]:
        """For the block."""
        watch = asyncio.create_task(self._watch(indices))
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def _watch(self, indices: Sequence[int]) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._lose_patience())
                for index in indices:
                    tasks.create_task(self._keep(index))
        except* EngineError:
            pass  # the pool is closed: who waits for an engine hears of it
        except* Exception as errors:
            log.exception("supervision of engines")
            self._pool.close(f"supervision of engines failed: {errors.exceptions[0]}")

    async def _keep(self, index: int) -> None:
        while True:
            if index in self._pool.up:
                await self._see_it_leave(index)
            else:
                await self._bring_back(index)

    async def _see_it_leave(self, index: int) -> None:
        while engine := self._pool.up.get(index):
            if index in self._pool.serving:
                await self._ping(index, engine)
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._pool.until(lambda: index not in self._pool.up)

    async def _ping(self, index: int, engine: Engine) -> None:
        try:
            async with asyncio.timeout(self._heartbeat_s):
                await engine.ping()
        except TimeoutError:
            if self._pool.serving.get(index) is not engine:
                return  # it is being synced, and has a deadline there
            text = (
                f"engine {index} hangs: no answer to a ping within {self._heartbeat_s:g} s "
                "(placement.heartbeat_s)"
            )
            self._pool.fail(index, engine, as_death(EngineError(text)))
        except MedrlError as error:
            self._pool.fail(index, engine, error)

    async def _bring_back(self, index: int) -> None:
        try:
            if rest := self._pool.fallen.get(index):
                await rest.close()
            await asyncio.sleep(self._pool.put_off(index))
            engine = await self._start(index)
            if self._pool.serves_as_started:
                await engine.resume(0)
        except MedrlError as error:
            self._pool.fail(index, None, error)
            return
        self._pool.add(index, engine, later=True)
        if self._pool.serves_as_started:
            self._pool.serve({index: engine})

    async def _lose_patience(self) -> None:
        while True:
            await self._pool.until(lambda: not self._pool.up)
            try:
                async with asyncio.timeout(self._patience_s):
                    await self._pool.until(lambda: self._pool.up)
            except TimeoutError:
                told = f"no engine came back within {self._patience_s:g} s"
                told += " (placement.start_timeout_s)"
                self._pool.close("; ".join(filter(None, (told, self._lacking()))))
