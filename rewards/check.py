"""Try the rewards before anything expensive starts."""

from __future__ import annotations

from collections.abc import Sequence

from medrl.actors.types import Prompt, Score
from medrl.configs.errors import UserError
from medrl.rewards.built_in import ANSWERS
from medrl.rewards.compose import Term
from medrl.rewards.modes import get_mode
from medrl.rewards.pool import RewardPool

_ROWS = 8


def check_rewards(
    terms: Sequence[Term],
    mode: str,
    prompts: Sequence[Prompt],
    timeout_s: float = 5.0,
    *,
    policy: str = "strict",
) -> None:
    """Resolve all terms, and score the gold answers of the first rows in the mode's own form.

    Done in a process of the pool, so that the driver neither imports a user's module nor hangs
    with it. Raises UserError: what does not resolve; a gold answer that is not scored 1 by
    accuracy and format; a reward that fails on one; a built-in reward for answers that gives 1 to
    none of them.
    """
    tried = list(prompts[:_ROWS])
    write = get_mode(mode).write
    with RewardPool(terms, mode, processes=1, timeout_s=timeout_s, policy=policy) as pool:
        scores = pool.score_pairs([(prompt, write(prompt.answer)) for prompt in tried])
    problems = [
        f"rewards on the gold answer of row {prompt.id}, {write(prompt.answer)[:80]!r}: {flaw}"
        for prompt, score in zip(tried, scores, strict=True)
        if (flaw := _flaw(score))
    ]
    problems += _unfit(terms, tried, scores)
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


def _unfit(terms: Sequence[Term], prompts: Sequence[Prompt], scores: Sequence[Score]) -> list[str]:
    """Name the built-in rewards that are for another kind of answer: they would always be 0."""
    names = [term.use for term in terms if term.use in ANSWERS] if scores else []
    return [
        f"reward {name}: gives 1 to none of the first {len(scores)} gold answers, e.g. "
        f"{prompts[0].answer[:40]!r} of row {prompts[0].id}; it is for another kind of answer"
        for name in names
        if not any(score.components.get(name) == 1.0 for score in scores)
    ]
