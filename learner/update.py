"""One update: from scored groups to optimiser steps and what they measured. Knows no DeepSpeed.

The learner's policy at the start of the batch is "old": the ratio that is clipped measures what
this batch's own optimiser steps changed. With one step it is the policy itself, so no second
forward pass is needed; the distance to the policy that sampled is measured (`logprob_gap`) and,
for stale completions, corrected by `importance_cap`. The loss divides by counts over the whole
optimiser batch, so it is the same for any split over rows, micro-batches and ranks.

A loss or gradient that is no number is refused before it reaches the weights (`learner.stepper`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from medrl.actors.types import Group, Score, ScoredGroup, UpdateMetrics
from medrl.configs.errors import LearnerError
from medrl.configs.schema import LearnerConfig
from medrl.learner.batch import PromptInputs, RowBatch, build_rows
from medrl.learner.grpo import group_advantages, grpo_loss, zero_variance
from medrl.learner.model import PromptReader
from medrl.learner.objective import Denominators, Objective
from medrl.learner.rows import GroupSize, MicroBatch, Plan, plan_rows
from medrl.learner.settings import LearnerSettings, learning_rate
from medrl.learner.stepper import Stepper, on_all_ranks, read_images, refuse_not_finite
from medrl.learner.sums import Sums
from medrl.learner.vision import ImageInputs

_HINT = (
    "look at gradient_norm and logprob_gap.max of the last steps, and resume with a lower "
    "learner.learning_rate"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What one optimiser step trains, on this rank."""

    micro_batches: tuple[MicroBatch, ...]
    denominators: Denominators


@contextmanager
def _half_way(stepped: bool) -> Iterator[None]:
    """Have a refusal in the block say whether optimiser steps were made before."""
    try:
        yield
    except LearnerError as error:
        error.half_way = stepped
        raise


class Updater:
    """Trains batches of scored groups on one rank."""

    def __init__(self, stepper: Stepper, reader: PromptReader, settings: LearnerSettings) -> None:
        self._stepper = stepper
        self._reader = reader
        self._settings = settings
        self._objective = objective_of(settings.learner, settings.max_tokens)

    def update(self, batch: Sequence[ScoredGroup], version: int) -> UpdateMetrics:
        """`version`: of the weights before this update. Raises `LearnerError`; the weights are
        then whole, but a part of the batch's optimiser steps may be made (`half_way`)."""
        started = time.perf_counter()
        config = self._settings.learner
        advantages, same = self._advantages(batch)
        sizes = [_size(scored, config.mask_truncated) for scored in batch]
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
        sums = Sums(version, len(batch), self._stepper.device)
        rate = learning_rate(config, version, self._settings.total_steps)
        norms: list[float] = []
        for part, rows, start in zip(parts, work, old, strict=True):
            with _half_way(bool(norms)):
                loss = self._accumulate(rows, start, part.denominators, sums)
                refuse_not_finite(self._stepper, "loss", loss, version, _HINT)
                norms.append(self._stepper.step(rate))
                refuse_not_finite(self._stepper, "gradient's norm", norms[-1], version, _HINT)
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
            gap_tokens=round(totals["fresh_tokens"]),
            logprob_gap_stale=totals["drift"],
            group_gaps=sums.group_gaps(self._stepper.reduce),
        )

    def logprobs(self, group: Group) -> tuple[tuple[float, ...], ...]:
        """[G][C] of the group's completions under the weights as they are."""
        nothing = Score(components={}, total=0.0, outcome="ok")
        scored = ScoredGroup(group=group, scores=(nothing,) * len(group.completions), seconds=0.0)
        size = _size(scored, mask_truncated=False)
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
        rows = [row for part in parts for one in part.micro_batches for row in one.rows]
        mine = sorted({row.group for row in rows})

        def read() -> dict[int, PromptInputs]:
            self._reader.read_images(batch[index].group.request for index in mine)
            return {index: self._reader.read(batch[index].group) for index in mine}

        return on_all_ranks(self._stepper, read)

    def _images(self, rows: RowBatch) -> list[ImageInputs]:
        return read_images(self._stepper, self._reader, rows)

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


def objective_of(config: LearnerConfig, max_tokens: int) -> Objective:
    """The variant that a config names."""
    return Objective(
        ratio=config.ratio,
        surrogate=config.surrogate,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        aggregation=config.aggregation,
        kl_coefficient=config.kl_coefficient,
        kl_gradient=config.kl_gradient,
        importance_cap=config.importance_cap,
        max_tokens=max_tokens,
    )


def _size(scored: ScoredGroup, mask_truncated: bool) -> GroupSize:
    """With the completions to train: none that failed, and none cut off where these are masked."""
    return GroupSize(
        prompt=len(scored.group.prompt_token_ids),
        completions=tuple(
            (index, len(completion.token_ids))
            for index, completion in enumerate(scored.group.completions)
            if not scored.scores[index].failed
            and not (mask_truncated and completion.finish_reason == "length")
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
