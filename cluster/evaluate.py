"""Held-out questions through the run's engines: one greedy completion a prompt, scored.

`evaluate` is what a run does between steps; `full_evaluation` adds the blind probe and keeps every
prediction, for `medrl eval` and experiments. Both need engines that serve already.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medrl.actors.sampler import Sampler
from medrl.actors.types import Prompt, RolloutRequest, ScoredGroup
from medrl.cluster.interrupt import Interrupt
from medrl.cluster.report import write_json
from medrl.cluster.requests import Requests
from medrl.reports.breakdown import summarize
from medrl.rewards.offline import write_lines
from medrl.rewards.scorer import Scorer, StrictScorer


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What one evaluation found, down to each completion."""

    numbers: dict[str, Any]  # as `breakdown.summarize` gives them
    predictions: tuple[Mapping[str, Any], ...]  # lines that `medrl score` reads, a prompt each
    blind: tuple[Mapping[str, Any], ...]  # likewise, with the images blanked; () without the probe


async def evaluate(
    prompts: Sequence[Prompt],
    request: Callable[[int, Prompt], RolloutRequest],
    sampler: Sampler,
    scorer: Scorer,
) -> list[ScoredGroup]:
    """One scored group (of one greedy completion) a prompt, in order."""
    requests = [request(number, prompt) for number, prompt in enumerate(prompts)]
    return await _answers(requests, sampler, scorer)


async def full_evaluation(
    prompts: Sequence[Prompt],
    requests: Requests,
    sampler: Sampler,
    *,
    image_root: Path,
    blind: bool,
    interrupt: Interrupt,
    step: int = 0,
    split: str = "test",
) -> Evaluation:
    """All prompts greedily in the mode of `requests`, and with `blind` those that have images a
    second time with them blanked. Raises `Interrupted`, and what engines raise."""
    scorer = StrictScorer(requests.mode.name)
    asked = [requests.greedy(number, prompt) for number, prompt in enumerate(prompts)]
    probes = [replace(one, blind=True) for one in asked if blind and one.prompt.images]
    seeing = await interrupt.cancels(_answers(asked, sampler, scorer))
    unseeing = await interrupt.cancels(_answers(probes, sampler, scorer))
    return Evaluation(
        numbers=summarize(step, split, seeing, unseeing),
        predictions=tuple(_line(group, requests.mode.name, image_root) for group in seeing),
        blind=tuple(_line(group, requests.mode.name, image_root) for group in unseeing),
    )


def write(evaluation: Evaluation, out: Path, **about: Any) -> dict[str, Any]:
    """Write the numbers to `out`, NAME.json, and beside it NAME.predictions.jsonl and, with the
    probe, NAME.blind.jsonl. Returns the numbers as written: `about` (what only the caller knows)
    comes first, "predictions" and "blind_predictions" name the files. Raises `UserError`."""
    predictions = out.with_name(f"{out.stem}.predictions.jsonl")
    blind = out.with_name(f"{out.stem}.blind.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_lines(predictions, evaluation.predictions)
    blind.unlink(missing_ok=True)  # of an earlier evaluation of this name
    if evaluation.blind:
        write_lines(blind, evaluation.blind)
    numbers = {
        **about,
        **evaluation.numbers,
        "predictions": predictions.name,
        "blind_predictions": blind.name if evaluation.blind else None,
    }
    write_json(out, numbers)
    return numbers


async def _answers(
    requests: Sequence[RolloutRequest], sampler: Sampler, scorer: Scorer
) -> list[ScoredGroup]:
    async def one(request: RolloutRequest) -> ScoredGroup:
        return await scorer.score_group(await sampler.sample(request))

    try:
        async with asyncio.TaskGroup() as tasks:
            jobs = [tasks.create_task(one(request)) for request in requests]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [job.result() for job in jobs]


def _line(group: ScoredGroup, mode: str, image_root: Path) -> dict[str, Any]:
    """A completion as `medrl score` takes it, and what was asked and found."""
    request, score = group.group.request, group.scores[0]
    prompt, completion = request.prompt, group.group.completions[0]
    return {
        "id": prompt.id,
        "completion": completion.text,
        "answer": prompt.answer,
        **({"options": list(prompt.options)} if prompt.options else {}),
        "mode": mode,
        "question": prompt.question,
        "images": list(prompt.images),
        "image_root": str(image_root),
        "modality": prompt.modality,
        "question_type": prompt.question_type,
        "source": prompt.source,
        "blind": request.blind,
        "tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "strict": score.components["accuracy"],
        "lenient": score.components["lenient"],
        "format": score.components["format"],
        "outcome": score.outcome,
        "reason": score.reason,
    }
