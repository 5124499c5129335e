"""The schedule of a run that is done, handed out again: stands where `GroupBuffer` does.

That one decides by what is scored first; this one knows. A draw is admitted once the version is
served that sampled it, and a batch waits for all draws of the version, for then comes a push: so
each group meets the weights it met then. Rolling out and learning take turns; the losses do not
depend on it. No ray, no I/O; one asyncio condition.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

from medrl.actors.types import Group, Score, ScoredGroup
from medrl.cluster.recording import RecordedStep
from medrl.rewards.scorer import Scorer


class ReplayBuffer:
    """Obeys `actors.buffer.Buffer`."""

    def __init__(self, steps: Sequence[RecordedStep]) -> None:
        """`steps`: the first of a run, without a gap."""
        self._steps = steps
        self._version = 0
        self._by_version: dict[int, list[int]] = {}  # draws not admitted yet, by who samples them
        for group in (group for step in steps for group in step.groups):
            self._by_version.setdefault(group.version, []).append(group.draw)
        self._running: set[int] = set()
        self._ready: dict[int, ScoredGroup] = {}
        self._replaced: list[ScoredGroup] = []
        self._stopped = False
        self._failure: BaseException | None = None
        self._changed = asyncio.Condition()

    @property
    def version(self) -> int:
        return self._version

    @property
    def replaced(self) -> list[ScoredGroup]:
        return self._replaced

    async def admit(self) -> int | None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._due or self._finished)
            if self._finished:
                return None
            draw = self._due.pop(0)
            self._running.add(draw)
            return draw

    async def put(self, group: ScoredGroup) -> None:
        async with self._changed:
            self._running.remove(group.group.request.draw)
            self._ready[group.group.request.draw] = group
            self._changed.notify_all()

    async def take(self) -> list[ScoredGroup]:
        """The recorded batch in its order. Empty after the last, and after `stop`."""
        async with self._changed:
            await self._changed.wait_for(self._has_answer)
            if self._failure is not None:
                raise self._failure
            if self._stopped or self._finished:
                return []
            step = self._steps[self._version]
            self._replaced = [self._ready.pop(draw) for draw in step.replaced]
            return [self._ready.pop(draw) for draw in step.batch]

    async def advance(self, version: int) -> None:
        async with self._changed:
            self._version = version
            self._changed.notify_all()

    async def stop(self) -> None:
        """No more batches."""
        async with self._changed:
            self._stopped = True
            self._changed.notify_all()

    async def fail(self, error: BaseException) -> None:
        async with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    @property
    def _due(self) -> list[int]:
        """Draws the version served now sampled, and has not been asked yet."""
        return self._by_version.get(self._version, [])

    @property
    def _finished(self) -> bool:
        return self._version >= len(self._steps)

    def _has_answer(self) -> bool:
        stopped = self._stopped or self._failure is not None
        return stopped or self._finished or not (self._due or self._running)


class ReplayScorer:
    """Scores again. What had no score then (a time limit: chance) has none now, for it was not
    trained; everything else counts as it is scored now."""

    def __init__(self, scorer: Scorer, steps: Sequence[RecordedStep]) -> None:
        self._scorer = scorer
        self._failed: dict[int, Mapping[int, Score]] = {
            group.draw: group.failed for step in steps for group in step.groups if group.failed
        }

    async def score_group(self, group: Group) -> ScoredGroup:
        scored = await self._scorer.score_group(group)
        failed = self._failed.get(group.request.draw, {})
        scores = tuple(failed.get(place, score) for place, score in enumerate(scored.scores))
        return replace(scored, scores=scores)
