"""Which engines there are, and which of them may serve. Standard library only.

    add ──> stale ──serve──> serving ──rest──> stale       fail: from either to fallen
             ^                                               │
             └──────── add: started again (a supervisor) ────┘

*Serving*: a receipt proves the version it holds. *Stale*: up, and never asked before a push proved
its version. The sampler and the sync say `fail` of an engine whose calls end in a death; whoever
waits meets an error only once no engine is left that could come back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from medrl.actors.engine import Engine
from medrl.configs.errors import EngineError, MedrlError

MAX_DEATHS = 4
"""So many without a finished group in between are a crash loop. Where each try ends before any work
is done, the next at once is not likely to do better: it is put off, or the end where nobody else is
left."""
PUT_OFF_S = 30.0  # the first time; twice as long after each further death
MOST_PUT_OFF_S = 600.0


Event = Literal["left", "waiting", "returned", "put off", "given up", "joined"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """That a part of the run left, waits for room, came back, is put off or given up, or is new."""

    who: str  # "engine 1", "learner"
    event: Event
    cause: str  # of its leaving or waiting
    seconds: float = 0.0  # out of service until now; put off: until it is tried again

    def __str__(self) -> str:
        if self.event == "left":
            return f"{self.who} is started again: {self.cause}"
        if self.event == "waiting":
            return f"{self.who} waits for room: {self.cause}"
        if self.event == "joined":
            return f"{self.who} joins"
        if self.event == "returned":
            return f"{self.who} is back after {self.seconds:.1f} s"
        if self.event == "put off":
            return (
                f"{self.who} died {MAX_DEATHS} times or more without finishing a group; it is "
                f"tried again in {self.seconds:.0f} s, the others go on; the first cause: "
                f"{self.cause}"
            )
        return f"{self.who} is given up after {MAX_DEATHS} deaths, the first: {self.cause}"


@dataclass(slots=True)
class _Record:
    """Of an engine's deaths since it last finished a group."""

    first: MedrlError
    deaths: int = 0
    since: float | None = None  # when it left, where it does not serve yet; monotonic


class EnginePool:
    """All engines of a run, by index. Nothing here waits for an engine."""

    def __init__(self, tell: Callable[[Outage], None] = lambda outage: None) -> None:
        self.tell = tell
        self.serves_as_started = False  # whether engines serve the model they were started with
        self._up: dict[int, Engine] = {}
        self._serving: set[int] = set()
        self._fallen: dict[int, Engine | None] = {}  # what is left of it may still have to be ended
        self._records: dict[int, _Record] = {}
        self._known: set[int] = set()  # that were ever up
        self._new: set[int] = set()  # came later, and have not served yet
        self._stop: str | None = None  # why nobody waits for an engine any more
        self._failure: EngineError | None = None
        self._changed = asyncio.Event()

    @property
    def up(self) -> dict[int, Engine]:
        return dict(self._up)

    @property
    def serving(self) -> dict[int, Engine]:
        return {index: self._up[index] for index in sorted(self._serving)}

    @property
    def stale(self) -> dict[int, Engine]:
        return {i: engine for i, engine in self._up.items() if i not in self._serving}

    @property
    def fallen(self) -> dict[int, Engine | None]:
        """Those to be started again, and what is left of each."""
        return dict(self._fallen)

    def add(self, index: int, engine: Engine, *, later: bool = False) -> None:
        """It is up: stale until `serve`. `later`: after the start, when one that never was up has
        the pool grow."""
        self._fallen.pop(index, None)
        self._up[index] = engine
        if later and index not in self._known:
            self._new.add(index)
        self._known.add(index)
        self.changed()

    def serve(self, members: Mapping[int, Engine]) -> None:
        """A receipt proves what they hold."""
        for index, engine in members.items():
            if self._up.get(index) is not engine:
                continue  # it fell meanwhile
            self._serving.add(index)
            record = self._records.get(index)
            if index in self._new:
                self._new.remove(index)
                self._tell(index, "joined")
            elif record and record.since is not None:
                self._tell(index, "returned", record.first, time.monotonic() - record.since)
            if record:
                record.since = None
        self.changed()

    def rest(self, members: Mapping[int, Engine]) -> None:
        """They are paused, and wait for the next version."""
        self._serving -= {i for i, engine in members.items() if self._up.get(i) is engine}

    def answered(self, index: int, engine: Engine) -> None:
        """It finished a group: what it died of before is over."""
        if self._up.get(index) is engine:
            self._records.pop(index, None)

    def fail(self, index: int, engine: Engine | None, cause: MedrlError) -> None:
        """`engine` died of `cause`, or hangs; None: it could not be started again. Telling so twice
        of one engine is harmless."""
        if engine is not None and self._up.get(index) is not engine:
            return
        self._up.pop(index, None)
        self._serving.discard(index)
        self._fallen[index] = engine
        record = self._records.setdefault(index, _Record(first=cause))
        record.deaths += 1
        if record.since is None:
            record.since = time.monotonic()
        if engine is not None or record.deaths < MAX_DEATHS:
            self._tell(index, "left", cause)
        if self._stop and not self._up:
            self.close(self._stop)
        self.changed()

    def waits(self, index: int, lacking: str) -> None:
        """It left, and there is no room to start it again: that is no death."""
        if index in self._fallen:
            self._tell(index, "waiting", lacking)

    def deaths(self, index: int) -> int:
        """In a row, without a finished group in between."""
        return self._records[index].deaths if index in self._records else 0

    def put_off(self, index: int) -> float:
        """Seconds until it is to be tried again: 0, at once, unless it is in a crash loop. Where
        none is up and all that fell are, the pool is closed."""
        deaths = self.deaths(index)
        if deaths < MAX_DEATHS:
            return 0.0
        seconds = min(PUT_OFF_S * 2.0 ** (deaths - MAX_DEATHS), MOST_PUT_OFF_S)
        self._tell(index, "put off", self._records[index].first, seconds)
        if not self._up and all(self.deaths(one) >= MAX_DEATHS for one in self._fallen):
            self.close(f"no engine is left: each died {MAX_DEATHS} times without finishing a group")
        return seconds

    def stop(self, reason: str) -> None:
        """What is asked now may end, but nobody is to wait until an engine comes back."""
        self._stop = reason
        if not self._up:
            self.close(reason)

    def close(self, reason: str) -> None:
        """No engine comes back: whoever waits for one gets the first cause, and `reason`."""
        first = min(self._records.values(), key=lambda it: it.since or 0.0, default=None)
        told = f"{first.first}\n{reason}" if first else reason
        self._failure = self._failure or EngineError(told)
        self.changed()

    def changed(self) -> None:
        """Have those that wait look again."""
        before, self._changed = self._changed, asyncio.Event()
        before.set()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for `condition`; raises `EngineError` once the pool is closed."""
        while not condition():
            if self._failure:
                raise self._failure
            await self._changed.wait()

    def _tell(
        self, index: int, event: Event, cause: MedrlError | str = "", seconds: float = 0.0
    ) -> None:
        first_line = str(cause).partition("\n")[0]
        self.tell(Outage(who=f"engine {index}", event=event, cause=first_line, seconds=seconds))
