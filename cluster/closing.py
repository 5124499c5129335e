"""End what was started, however a run ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

CLOSE_TIMEOUT_S = 8.0  # of an orderly end; past it processes are killed

log = logging.getLogger(__name__)


async def close_all(started: Sequence[Any]) -> None:
    """Failures aside: there is nothing left to save here."""

    async def close(one: Any) -> None:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await one.close()
        except Exception as error:  # a dead actor cannot say goodbye, and need not
            log.debug("closing %s: %s", type(one).__name__, error)

    await asyncio.gather(*(close(one) for one in started))
