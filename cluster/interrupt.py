"""Ctrl-C and SIGTERM: the first asks for a clean stop, the second ends the process at once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
EXIT_STATUS = 130


class Interrupted(Exception):
    """The user asked the run to stop."""


class Interrupt:
    """Whether a stop was asked for, and what it ends at once."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def on_request(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals for the block. Needs a running loop on the main thread, and comes after
        `ray.init`, which takes SIGTERM for itself."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    async def cancels(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work`, unless a stop is asked for: then cancel it and raise `Interrupted`."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._event.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise Interrupted
        finally:
            stop.cancel()
            task.cancel()
            await asyncio.gather(task, stop, return_exceptions=True)

    def _on_signal(self) -> None:
        if self.requested:
            os._exit(EXIT_STATUS)
        self._event.set()
        for listener in self._listeners:
            listener()
