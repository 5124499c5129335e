"""Score whole groups. `LocalScorer` does it here; `rewards.actor` in a Ray actor."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from medrl.actors.types import Group, Prompt, Score, ScoredGroup
from medrl.rewards.pool import RewardPool

ScoreCompletions = Callable[[Prompt, Sequence[str]], Awaitable[tuple[Score, ...]]]


class Scorer(Protocol):
    """Says of each completion of a group how good it is."""

    async def score_group(self, group: Group) -> ScoredGroup: ...


async def score_group(score: ScoreCompletions, group: Group) -> ScoredGroup:
    """Score a group's completions by their text, and time it."""
    begin = time.perf_counter()
    texts = [completion.text for completion in group.completions]
    scores = await score(group.request.prompt, texts)
    return ScoredGroup(group=group, scores=scores, seconds=time.perf_counter() - begin)


class LocalScorer:
    """A pool in this process: for evaluation without Ray, and for tests."""

    def __init__(self, pool: RewardPool) -> None:
        self._pool = pool

    async def score_group(self, group: Group) -> ScoredGroup:
        return await score_group(self._pool.score, group)

    async def close(self) -> None:
        """Leave no process. Safe to call twice."""
        self._pool.close()
