"""One update: from scored groups to optimiser steps and what they measured. Knows no DeepSpeed.

The learner's policy at the start of the batch is "old": the ratio that is clipped measures what
this batch's own optimiser steps changed. With one step it is the policy itself, so no second
forward pass is needed; the distance to the policy that sampled is measured (`logprob_gap`) and,
for stale completions, corrected by `importance_cap`. The loss divides by counts over the whole
optimiser batch, so it is the same for any split over rows, micro-batches and ranks.

Every refusal is of all ranks, for a rank that went on alone would wait for ever. A loss or gradient
that is no number is refused before it reaches the weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from medrl.actors.types import Group, Score, ScoredGroup, UpdateMetrics
from medrl.configs.errors import LearnerError
from medrl.learner.batch import PromptInputs, RowBatch, build_rows
from medrl.learner.grpo import (
    Denominators,
    Objective,
    group_advantages,
    grpo_loss,
    zero_variance,
)
from medrl.learner.model import ImageInputs, PromptReader
from medrl.learner.rows import GroupSize, MicroBatch, Plan, plan_rows
from medrl.learner.settings import LearnerSettings, learning_rate
from medrl.learner.sums import Sums


class Stepper(Protocol):
    """One rank of whatever holds the weights. Every call is made by all ranks, in one order."""

    rank: int
    world: int
    device: torch.device

    def score(
        self, rows: RowBatch, images: list[ImageInputs], *, reference: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the rows' tokens, [B, S, C]; `images` of `rows.images`."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss` to the sum over ranks; `last` before a step."""
        ...

    def step(self, learning_rate: float) -> float:
        """One optimiser step, but none where the gradient is not finite; returns its norm before
        clipping."""
        ...

    def reduce(self, values: Tensor, how: str) -> Tensor:
        """ "sum" or "max" over ranks, elementwise."""
        ...

    def first_error(self, mine: str) -> str:
        """The first rank's error that is not empty."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What one optimiser step trains, on this rank."""

    micro_batches: tuple[MicroBatch, ...]
    denominators: Denominators


class Updater:
    """Trains batches of scored groups on one rank."""

    def __init__(self, stepper: Stepper, reader: PromptReader, settings: LearnerSettings) -> None:
        self._stepper = stepper
        self._reader = reader
        self._settings = settings
        config = settings.learner
        self._objective = Objective(
            ratio=config.ratio,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            aggregation=config.aggregation,
            kl_coefficient=config.kl_coefficient,
            kl_gradient=config.kl_gradient,
            importance_cap=config.importance_cap,
            max_tokens=settings.max_tokens,
        )

    def update(self, batch: Sequence[ScoredGroup], version: int) -> UpdateMetrics:
        """`version`: of the weights before this update. Raises `LearnerError`; the weights are
        then whole, but a part of the batch's optimiser steps may be made."""
        started = time.perf_counter()
        config = self._settings.learner
        advantages, same = self._advantages(batch)
        sizes = [_size(scored) for scored in batch]
        plans = [
            plan_rows(part, world=self._stepper.world, budget=config.tokens_per_micro_batch)
            for part in _split(sizes, config.updates_per_batch)
        ]
        parts = [_part(plan, self._stepper.rank, sizes) for plan in plans]
        prompts = self._read(batch, parts)
        work = [
            [
                build_rows(one, batch, prompts, advantages, self._reader.blank)
                for one in part.micro_batches
            ]
            for part in parts
        ]
        # Before the first step, while the weights are still those of `version`.
        old = [self._logprobs(rows) if len(parts) > 1 else None for rows in work]
        sums = Sums(version, self._stepper.device)
        rate = learning_rate(config, version, self._settings.total_steps)
        norms = []
        for part, rows, start in zip(parts, work, old, strict=True):
            loss = self._accumulate(rows, start, part.denominators, sums)
            self._refuse(_not_finite("loss", loss, version))
            norms.append(self._stepper.step(rate))
            self._refuse(_not_finite("gradient's norm", norms[-1], version))
        totals = sums.over_ranks(self._stepper.reduce)
        return UpdateMetrics(
            loss=totals["loss"] / len(parts),
            kl=totals["kl"] / max(totals["tokens"], 1),
            entropy=totals["entropy"] / max(totals["tokens"], 1),
            clip_fraction=totals["clipped"] / max(totals["tokens"], 1),
            gradient_norm=sum(norms) / len(norms),
            learning_rate=rate,
            logprob_gap_mean=totals["gap"] / max(totals["gap_tokens"], 1),
            logprob_gap_max=totals["gap_max"],
            zero_variance_groups=same,
            trained_completions=sum(len(size.completions) for size in sizes),
            prompt_tokens=sum(size.prompt for size in sizes),
            completion_tokens=round(totals["tokens"]),
            visual_tokens=sum(
                scored.group.prompt_token_ids.count(self._reader.blank.token_id) for scored in batch
            ),
            sharing=sum(plan.padded_tokens for plan in plans)
            / max(sum(plan.tokens for plan in plans), 1),
            advantages=tuple(map(tuple, advantages)),
            seconds=time.perf_counter() - started,
            importance_mean=totals["importance"] / max(totals["tokens"], 1),
        )

    def logprobs(self, group: Group) -> tuple[tuple[float, ...], ...]:
        """[G][C] of the group's completions under the weights as they are."""
        nothing = Score(components={}, total=0.0, outcome="ok")
        scored = ScoredGroup(group=group, scores=(nothing,) * len(group.completions), seconds=0.0)
        size = _size(scored)
        # Every rank scores the group: under ZeRO-3 all of them are needed for it anyway.
        plan = plan_rows([size], world=1, budget=self._settings.learner.tokens_per_micro_batch)
        parts = [_part(plan, 0, [size])]
        prompts = self._read([scored], parts)
        zeros = [[0.0] * len(group.completions)]
        found: dict[int, tuple[float, ...]] = {}
        for micro_batch in parts[0].micro_batches:
            rows = build_rows(micro_batch, [scored], prompts, zeros, self._reader.blank)
            (values,) = self._logprobs([rows])
            for b, row in enumerate(rows.rows):
                for s, index in enumerate(row.completions):
                    found[index] = tuple(values[b, s][rows.present[b, s]].tolist())
        return tuple(found[index] for index in range(len(group.completions)))

    def _advantages(self, batch: Sequence[ScoredGroup]) -> tuple[list[list[float]], int]:
        """[P][G], and how many groups carry no gradient. Groups may differ in G."""
        advantages, same = [], 0
        for scored in batch:
            rewards = torch.tensor([[score.total for score in scored.scores]], dtype=torch.float64)
            valid = torch.tensor([[not score.failed for score in scored.scores]])
            kind = self._settings.learner.advantage
            advantages.append(group_advantages(rewards, valid, kind)[0].tolist())
            same += int(zero_variance(rewards, valid))
        return advantages, same

    def _read(
        self, batch: Sequence[ScoredGroup], parts: Sequence[_Part]
    ) -> dict[int, PromptInputs]:
        """The prompts of this rank's groups."""
        mine = {row.group for part in parts for one in part.micro_batches for row in one.rows}
        prompts, error = {}, ""
        try:
            for index in sorted(mine):
                prompts[index] = self._reader.read(batch[index].group)
        except Exception as problem:
            error = str(problem) or type(problem).__name__
        self._refuse(error)
        return prompts

    def _images(self, rows: RowBatch) -> list[ImageInputs]:
        """Of a micro-batch. One that left the cache is read again, and may have changed."""
        images, error = [], ""
        try:
            images = [self._reader.image(hash) for hash in rows.images]
        except Exception as problem:
            error = str(problem) or type(problem).__name__
        self._refuse(error)
        return images

    def _refuse(self, error: str) -> None:
        """Raise on every rank what any rank has to say; nothing where all are silent."""
        if error := self._stepper.first_error(error):
            raise LearnerError(error)

    def _logprobs(self, work: Sequence[RowBatch]) -> list[Tensor]:
        """[B, S, C] of each, without gradient."""
        with torch.no_grad():
            return [self._stepper.score(rows, self._images(rows))[0] for rows in work]

    def _accumulate(
        self,
        work: Sequence[RowBatch],
        old: Sequence[Tensor] | None,
        denominators: Denominators,
        sums: Sums,
    ) -> float:
        """Forward and backward of one optimiser step's micro-batches; this rank's loss."""
        loss = torch.zeros((), device=self._stepper.device)
        for number, cpu_rows in enumerate(work):
            rows = cpu_rows.to(self._stepper.device)
            images = self._images(rows)
            reference = None
            if self._objective.kl_coefficient:
                with torch.no_grad():
                    reference = self._stepper.score(rows, images, reference=True)[0].flatten(0, 1)
            logprobs, entropies = self._stepper.score(rows, images)
            before = (logprobs.detach() if old is None else old[number]).flatten(0, 1)
            terms = grpo_loss(
                logprobs.flatten(0, 1),
                before,
                rows.sampler.flatten(0, 1),
                reference,
                rows.advantages.flatten(),
                rows.trained.flatten(0, 1),
                self._objective,
                denominators,
            )
            self._stepper.backward(terms.loss, last=number == len(work) - 1)
            sums.add(rows, terms, entropies, before.view_as(logprobs))
            loss += terms.loss.detach()
        return float(loss)


def _not_finite(what: str, value: float, version: int) -> str:
    if math.isfinite(value):
        return ""
    return (
        f"step {version + 1}: the {what} is {value}, so the optimiser step was not made and the "
        "weights are those of the step before; look at gradient_norm and logprob_gap.max of the "
        "last steps, and resume with a lower learner.learning_rate"
    )


def _size(scored: ScoredGroup) -> GroupSize:
    return GroupSize(
        prompt=len(scored.group.prompt_token_ids),
        completions=tuple(
            (index, len(completion.token_ids))
            for index, completion in enumerate(scored.group.completions)
            if not scored.scores[index].failed
        ),
        images=len(scored.group.image_hashes),
    )


def _split(sizes: Sequence[GroupSize], parts: int) -> list[list[GroupSize]]:
    """Parts in order, equal but for one group. Groups of other parts stay in place, empty, so that
    indices remain those of the batch."""
    if len(sizes) < parts:
        raise LearnerError(
            f"a batch of {len(sizes)} groups cannot be split into learner.updates_per_batch = "
            f"{parts} parts: set it to at most rollout.prompts"
        )
    part_of = [index * parts // len(sizes) for index in range(len(sizes))]
    return [
        [
            size if part_of[index] == part else GroupSize(prompt=0, completions=(), images=0)
            for index, size in enumerate(sizes)
        ]
        for part in range(parts)
    ]


def _part(plan: Plan, rank: int, sizes: Sequence[GroupSize]) -> _Part:
    groups = {row.group for mine in plan.ranks for one in mine for row in one.rows}
    lengths = [tokens for group in groups for _, tokens in sizes[group].completions]
    return _Part(
        micro_batches=plan.ranks[rank],
        denominators=Denominators(completions=len(lengths), tokens=sum(lengths)),
    )
