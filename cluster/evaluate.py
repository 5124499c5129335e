"""Held-out accuracy: one greedy completion a prompt, scored strictly, through the run's engines."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from medrl.actors.sampler import Sampler
from medrl.actors.types import Prompt, RolloutRequest, ScoredGroup
from medrl.configs.errors import RewardError
from medrl.rewards.scorer import Scorer


async def evaluate(
    prompts: Sequence[Prompt],
    request: Callable[[int, Prompt], RolloutRequest],
    sampler: Sampler,
    scorer: Scorer,
) -> list[ScoredGroup]:
    """One scored group (of one greedy completion) a prompt, in order."""

    async def one(number: int, prompt: Prompt) -> ScoredGroup:
        return await scorer.score_group(await sampler.sample(request(number, prompt)))

    try:
        async with asyncio.TaskGroup() as tasks:
            jobs = [tasks.create_task(one(n, prompt)) for n, prompt in enumerate(prompts)]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [job.result() for job in jobs]


def summarize(step: int, split: str, groups: Sequence[ScoredGroup]) -> dict[str, Any]:
    """A line of evals.jsonl: accuracy needs the answer in the asked tags; `format` the whole form.

    A completion whose reward failed is an error here: a number from the rest would not be the
    split's.
    """
    failed = [group for group in groups if group.scores[0].failed]
    if failed:
        score = failed[0].scores[0]
        raise RewardError(
            f"evaluation: {len(failed)} of {len(groups)} completions could not be scored, e.g. "
            f"prompt {failed[0].group.request.prompt.id}: {score.outcome}, {score.reason}"
        )
    by_modality: dict[str, list[float]] = defaultdict(list)
    by_question_type: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        prompt, right = group.group.request.prompt, _component(group, "accuracy")
        by_modality[prompt.modality].append(right)
        by_question_type[prompt.question_type].append(right)
    return {
        "step": step,
        "split": split,
        "n": len(groups),
        "accuracy": fmean(_component(group, "accuracy") for group in groups),
        "format": fmean(_component(group, "format") for group in groups),
        "by_modality": _each(fmean, by_modality),
        "by_question_type": _each(fmean, by_question_type),
        "n_by_modality": _each(len, by_modality),
        "n_by_question_type": _each(len, by_question_type),
        "tokens.per_completion": fmean(
            len(group.group.completions[0].token_ids) for group in groups
        ),
    }


def _component(group: ScoredGroup, name: str) -> float:
    return group.scores[0].components[name]


def _each(
    measure: Callable[[list[float]], float], values: Mapping[str, list[float]]
) -> dict[str, float]:
    return {name: measure(values[name]) for name in sorted(values)}
