"""Where the time goes from the start of the process to the first completion: RUN/startup.jsonl."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class Startup:
    """A stopwatch: parts that follow one another (`reached`), and some side by side (`timed`)."""

    def __init__(self, began: float | None = None) -> None:
        """`began`: on `time.monotonic`'s clock; None: now."""
        self._began = self._last = time.monotonic() if began is None else began
        self._parts: dict[str, float] = {}
        self._beside: dict[str, float] = {}
        self._written = False

    def reached(self, part: str) -> None:
        """`part` is over, and took the time since the part before; only its first time counts."""
        if part not in self._parts:
            now = time.monotonic()
            self._parts[part], self._last = now - self._last, now

    async def timed(self, name: str, work: Awaitable[T]) -> T:
        """Await `work`, which others are awaited beside."""
        began = time.monotonic()
        done = await work
        self._beside[name] = time.monotonic() - began
        return done

    def write(self, run_dir: Path, first_completion: float | None) -> None:
        """Append the line once, when a completion is there: `first_completion` says since when."""
        if self._written or first_completion is None:
            return
        self._written = True
        parts = self._parts | {"first completion": first_completion - self._last}
        line = {
            "seconds": round(first_completion - self._began, 3),
            "parts": {part: round(seconds, 3) for part, seconds in parts.items()},
            "side_by_side": {name: round(seconds, 3) for name, seconds in self._beside.items()},
        }
        with (run_dir / "startup.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def process_start() -> float:
    """When this process was started, on `time.monotonic`'s clock. Linux."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)
