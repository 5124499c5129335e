"""Try the rewards before anything expensive starts."""

from __future__ import annotations

from collections.abc import Sequence

from medrl.actors.types import Prompt, Score
from medrl.configs.errors import UserError
from medrl.rewards.compose import Term
from medrl.rewards.modes import get_mode
from medrl.rewards.pool import RewardPool

_ROWS = 8


def check_rewards(
    terms: Sequence[Term], mode: str, prompts: Sequence[Prompt], timeout_s: float = 5.0
) -> None:
    """Resolve all terms, and score the gold answers of the first rows in the mode's own form.

    Done in a process of the pool, so that the driver neither imports a user's module nor hangs
    with it. Raises UserError: what does not resolve; a gold answer that is not scored 1 by
    accuracy and format; a reward that fails on one.
    """
    tried = list(prompts[:_ROWS])
    write = get_mode(mode).write
    with RewardPool(terms, mode, processes=1, timeout_s=timeout_s) as pool:
        scores = pool.score_pairs([(prompt, write(prompt.answer)) for prompt in tried])
    problems = [
        f"rewards on the gold answer of row {prompt.id}, {write(prompt.answer)[:80]!r}: {flaw}"
        for prompt, score in zip(tried, scores, strict=True)
        if (flaw := _flaw(score))
    ]
    if problems:
        raise UserError(*problems)


def _flaw(score: Score) -> str:
    if score.failed:
        return f"{score.outcome}: {score.reason}"
    low = [
        f"{name} is {score.components[name]:g}, not 1"
        for name in ("format", "accuracy")
        if score.components.get(name, 1.0) != 1.0
    ]
    return f"{', '.join(low)} ({score.reason or score.outcome})" if low else ""
