"""Wait for a call of a process that may hang: stopped, it fails in nothing and never answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")

BEAT_S = 1.0  # between two pings


class Hangs(Exception):
    """It answers no ping."""


async def answer(call: Awaitable[T], ping: Callable[[], Awaitable[Any]], heartbeat_s: float) -> T:
    """What `call` returns, however long it takes, as long as `ping` is answered beside it.

    Raises `Hangs` after two pings in a row that took half of `heartbeat_s` each: after one, it may
    be that this process itself was held up."""
    work = asyncio.ensure_future(_whole(call))
    pings = asyncio.ensure_future(_pings(ping, heartbeat_s))
    try:
        await asyncio.wait({work, pings}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            pings.result()  # raises
        return await work
    finally:
        work.cancel()
        pings.cancel()
        await asyncio.gather(work, pings, return_exceptions=True)


async def _pings(ping: Callable[[], Awaitable[Any]], heartbeat_s: float) -> None:
    missed = 0
    while missed < 2:
        await asyncio.sleep(BEAT_S)
        try:
            async with asyncio.timeout(heartbeat_s / 2):
                await ping()
            missed = 0
        except TimeoutError:
            missed += 1
    raise Hangs(f"hangs: no answer to a ping within {heartbeat_s:g} s (placement.heartbeat_s)")


async def _whole(call: Awaitable[T]) -> T:
    return await call  # Ray's references are awaitable, but no coroutines
