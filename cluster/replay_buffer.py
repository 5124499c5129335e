"""The schedule of a run that is done, handed out again: stands where `GroupBuffer` does.

That one decides by what is scored first; this one knows. A draw is admitted once the version is
served that sampled it, and a batch waits for all draws of the version, for then comes a push: so
each group meets the weights it met then. Rolling out and learning take turns; the losses do not
depend on it. No ray, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from medrl.actors.buffer import Buffer
from medrl.actors.types import Group, Score, ScoredGroup
from medrl.cluster.recording import RecordedStep
from medrl.rewards.scorer import Scorer


class ReplayBuffer(Buffer):
    """Batches are the recorded ones, in their order."""

    def __init__(self, steps: Sequence[RecordedStep]) -> None:
        """`steps`: the first of a run, without a gap."""
        super().__init__()
        self._steps = steps
        self._by_version: dict[int, list[int]] = {}  # draws not admitted yet, by who samples them
        for group in (group for step in steps for group in step.groups):
            self._by_version.setdefault(group.version, []).append(group.draw)
        self._running: set[int] = set()
        self._ready: dict[int, ScoredGroup] = {}

    async def admit(self) -> int | None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._due or self._finished())
            if self._finished():
                return None
            draw = self._due.pop(0)
            self._running.add(draw)
            return draw

    async def put(self, group: ScoredGroup) -> None:
        async with self._changed:
            self._running.remove(group.group.request.draw)
            self._ready[group.group.request.draw] = group
            self._changed.notify_all()

    @property
    def _due(self) -> list[int]:
        """Draws the version served now sampled, and has not been asked yet."""
        return self._by_version.get(self._version, [])

    def _finished(self) -> bool:
        return self._version >= len(self._steps)

    def _is_ready(self) -> bool:
        return not (self._due or self._running)

    def _next_batch(self) -> list[ScoredGroup]:
        step = self._steps[self._version]
        self._replaced = [self._ready.pop(draw) for draw in step.replaced]
        return [self._ready.pop(draw) for draw in step.batch]


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
