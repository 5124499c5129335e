"""Where scored groups wait for the learner. Sole owner of staleness and back-pressure.

Invariant: no batch holds a completion more than `staleness` versions behind the learner, and
nothing is ever thrown away for it. Two rules keep it, the same for every bound:

- *admit*: at most (staleness + 1) * P groups are started and not yet trained.
- *take*: a batch is the first P groups that were scored, as far as that leaves the others in time.
  A group started at version v is due at version v + staleness, and P groups can be taken a version:
  so of the groups due by version d, all but (d - now) * P must be in the batch, and are waited for.
  They never number more than P, for by the first rule there is a place for every group.

With staleness 0 the first rule starts exactly one batch a version and the second waits for all of
it: the synchronous loop is the same loop. No ray, no I/O; one asyncio condition.

Dynamic sampling: of the groups scored between two batches, those whose scores are all equal leave
their places to the next draws; at most `max_replaced`, the first in the order of draws, so that a
batch is always filled. One with a failed score stays, for failures are counted in batches. With
staleness 0 a batch is thus the shortest run of draws that holds P groups after this, whatever the
order they were scored in: timing decides nothing.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from medrl.actors.types import ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferState:
    """What a checkpoint keeps of the buffer."""

    version: int
    next_draw: int
    started: Mapping[int, int]  # draw -> version at its start, for all not yet taken
    ready: tuple[ScoredGroup, ...]  # scored and not yet taken
    uniform: tuple[int, ...] = ()  # of the draws that are ready: the next batch may replace them
    replaced: tuple[ScoredGroup, ...] = ()  # for a batch that became no version; out for good
    spent: int = 0  # how many of them count as the next batch's


class Buffer(ABC):
    """What the loop asks of a buffer. A kind of it decides what a batch is, by what is asked of it
    under the condition `_changed`: `_finished`, `_is_ready` and `_next_batch`."""

    def __init__(self) -> None:
        self._version = 0
        self._replaced: list[ScoredGroup] = []
        self._stopped = False
        self._failure: BaseException | None = None
        self._changed = asyncio.Condition()

    @property
    def version(self) -> int:
        """The version the engines serve, as `advance` last said."""
        return self._version

    @property
    def replaced(self) -> list[ScoredGroup]:
        """Groups replaced in filling the batch last taken, in the order of their draws."""
        return self._replaced

    @abstractmethod
    async def admit(self) -> int | None:
        """The next draw to roll out, once there is room for it; None when the run has no more."""

    @abstractmethod
    async def put(self, group: ScoredGroup) -> None:
        """Add a group that was admitted and is now scored."""

    async def take(self) -> list[ScoredGroup]:
        """The next batch; waits until it is complete.

        Empty after the last batch, and after `stop`. Raises what `fail` was given.
        """
        async with self._changed:
            await self._changed.wait_for(self._has_answer)
            if self._failure is not None:
                raise self._failure
            if self._stopped or self._finished():
                return []
            batch = self._next_batch()
            self._changed.notify_all()
            return batch

    async def advance(self, version: int) -> None:
        """The engines now serve `version`: more groups may start."""
        async with self._changed:
            self._version = version
            self._changed.notify_all()

    async def stop(self) -> None:
        """No more batches: `take` answers at once. What is scored stays, for a checkpoint."""
        async with self._changed:
            self._stopped = True
            self._changed.notify_all()

    async def fail(self, error: BaseException) -> None:
        """Rolling out failed: the learner meets `error` at its next `take`, between updates."""
        async with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    @abstractmethod
    def _finished(self) -> bool: ...

    @abstractmethod
    def _is_ready(self) -> bool: ...

    @abstractmethod
    def _next_batch(self) -> list[ScoredGroup]:
        """Called where it is ready; says what was `_replaced` for it as well."""

    def _has_answer(self) -> bool:
        stopped = self._stopped or self._failure is not None
        return stopped or self._finished() or self._is_ready()


class GroupBuffer(Buffer):
    """Hands out draws (`admit`), keeps scored groups (`put`), gives batches (`take`)."""

    def __init__(
        self, *, prompts: int, staleness: int, total_batches: int, max_replaced: int = 0
    ) -> None:
        """Batches of `prompts` groups, `total_batches` of them, at most `staleness` behind; for
        each, at most `max_replaced` groups of equal scores are replaced."""
        super().__init__()
        self._prompts = prompts
        self._staleness = staleness
        self._batches = total_batches
        self._max_replaced = max_replaced
        self._next_draw = 0
        self._redo: list[int] = []  # draws that were in flight when a checkpoint was made
        self._started: dict[int, int] = {}
        self._out: dict[int, int] = {}  # the batch that is being trained: draw -> version at start
        self._ready: dict[int, ScoredGroup] = {}  # by draw, in the order they were scored
        self._uniform: set[int] = set()  # draws of equal scores, scored since the last batch
        self._owed: list[ScoredGroup] = []  # replaced for a batch that a checkpoint found untrained
        self._spent = 0

    @property
    def settled(self) -> bool:
        """Whether no batch is between `take` and `advance`."""
        return not self._out

    async def admit(self) -> int | None:
        async with self._changed:
            await self._changed.wait_for(self._has_room)
            if self._finished():
                return None
            if self._redo:
                return self._redo.pop(0)
            draw = self._next_draw
            self._next_draw += 1
            self._started[draw] = self._version
            return draw

    async def put(self, group: ScoredGroup) -> None:
        draw = group.group.request.draw
        if draw not in self._started or draw in self._ready:
            raise ValueError(f"group of draw {draw} was not admitted, or was put twice")
        async with self._changed:
            self._ready[draw] = group
            if group.uniform and not any(score.failed for score in group.scores):
                self._uniform.add(draw)
            self._changed.notify_all()

    async def advance(self, version: int) -> None:
        self._out = {}
        await super().advance(version)

    def state(self) -> BufferState:
        """What to write into a checkpoint. A batch that is being trained is rolled out again, but
        not what was replaced for it."""
        lost = self._replaced if self._out else []
        # Places that groups scored since then have left already are not asked back.
        spent = self._spent or (0 if self._uniform else len(lost))
        return BufferState(
            version=self._version,
            next_draw=self._next_draw,
            started=self._started | self._out,
            ready=tuple(self._ready.values()),
            uniform=tuple(sorted(self._uniform)),
            replaced=(*self._owed, *lost),
            spent=spent,
        )

    def restore(self, state: BufferState) -> None:
        """Go on from a checkpoint: what was in flight then is rolled out again."""
        self._version = state.version
        self._next_draw = state.next_draw
        self._ready = {group.group.request.draw: group for group in state.ready}
        self._uniform = set(state.uniform)
        self._owed, self._spent = list(state.replaced), state.spent
        self._redo = sorted(draw for draw in state.started if draw not in self._ready)
        # What is rolled out again is as fresh as the version it is rolled out from.
        self._started = dict(state.started) | dict.fromkeys(self._redo, state.version)

    def _has_room(self) -> bool:
        batches = min(self._staleness + 1, self._batches - self._version)
        untrained = len(self._out) + len(self._started) - len(self._leaving())
        return bool(self._redo) or self._finished() or untrained < batches * self._prompts

    def _finished(self) -> bool:
        return self._version >= self._batches

    def _leaving(self) -> list[int]:
        """Draws that the next batch would leave out for good. One may be kept after all, when an
        earlier draw takes its place among the replaced: so no group becomes due earlier."""
        return sorted(self._uniform)[: max(0, self._max_replaced - self._spent)]

    def _is_ready(self) -> bool:
        return len(self._choose()) == self._prompts

    def _next_batch(self) -> list[ScoredGroup]:
        """In the order of its draws."""
        draws = self._choose()
        batch = [self._ready.pop(draw) for draw in sorted(draws)]
        leaving = self._leaving()
        self._replaced = [*self._owed, *(self._ready.pop(draw) for draw in leaving)]
        self._owed, self._spent, self._uniform = [], 0, set()
        self._out = {draw: self._started.pop(draw) for draw in draws}
        for draw in leaving:
            del self._started[draw]
        oldest = min(group.group.version for group in batch)
        age = self._version - oldest
        assert age <= self._staleness, f"a group {age} versions old got into a batch"
        return batch

    def _choose(self) -> list[int]:
        """Draws of the next batch; fewer than P while one must be waited for."""
        chosen: list[int] = []  # in the order they were scored, within each due version
        leaving = set(self._leaving())
        dues = {draw: self._due(draw) for draw in self._started if draw not in leaving}

        def take_first(count: int, due: int) -> None:
            ready = (d for d in self._ready if d in dues)
            free = (d for d in ready if d not in chosen and dues[d] <= due)
            chosen.extend(list(free)[: max(0, count)])

        last = self._version + self._staleness
        for due in sorted({*dues.values(), last}):
            by_then = sum(other <= due for other in dues.values())
            must_go = by_then - (due - self._version) * self._prompts
            if due == last:
                must_go = self._prompts  # nothing is due later: fill the batch
            take_first(must_go - len(chosen), due)
            if len(chosen) < must_go:
                break
        return chosen

    def _due(self, draw: int) -> int:
        return self._started[draw] + self._staleness
