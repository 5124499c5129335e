"""Score whole groups. `LocalScorer` does it here; `rewards.actor` in a Ray actor; `StrictScorer`
for evaluations, whatever a run is trained on.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Protocol

from medrl.actors.types import Group, Prompt, Score, ScoredGroup
from medrl.rewards.compose import PlainTerm, build_rewards
from medrl.rewards.policies import get_policy
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


class StrictScorer:
    """What evaluations report, so that runs trained on other policies and rewards can be compared:
    `format`, strict `accuracy`, and beside it `lenient`, which counts in no total.

    In this process: all are ours and linear in the text, so that nothing need be killed.
    """

    def __init__(self, mode: str) -> None:
        terms = (PlainTerm("format"), PlainTerm("accuracy"))
        self._rewards = build_rewards(terms, mode, policy="strict")
        self._lenient = get_policy("lenient").accuracy

    async def score_group(self, group: Group) -> ScoredGroup:
        return await score_group(self._score, group)

    async def _score(self, prompt: Prompt, completions: Sequence[str]) -> tuple[Score, ...]:
        return tuple(self._score_one(prompt, completion) for completion in completions)

    def _score_one(self, prompt: Prompt, completion: str) -> Score:
        strict = self._rewards.score(prompt, completion)
        if strict.failed:
            return strict
        lenient = self._lenient(self._rewards.mode, prompt, completion).total
        return replace(strict, components={**strict.components, "lenient": lenient})
