"""One supervised step: from examples to an optimiser step. Knows no DeepSpeed.

A prompt is what an engine would be given, token for token; the target's tokens follow it as if the
engine had sampled them, and the token an engine stops at ends them. So target and prompt are
tokenised each for itself, never across their seam, and nothing is cut. The loss is the mean -log p
over all target tokens of the batch (transformers' with labels of -100 on the prompt), under the
policy that engines sample from: the chat model's, without the tokens it may not emit.

Rows, vision and refusals are those of an update (`learner.rows`, `learner.stepper`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from medrl.actors.types import Completion, Example, Group, ImitationMetrics, Score, ScoredGroup
from medrl.configs.errors import LearnerError
from medrl.learner.batch import PromptInputs, build_rows
from medrl.learner.model import PromptReader
from medrl.learner.rows import GroupSize, plan_rows
from medrl.learner.settings import LearnerSettings, learning_rate
from medrl.learner.stepper import (
    Stepper,
    on_all_ranks,
    read_images,
    refuse,
    refuse_not_finite,
)

_HINT = "resume with a lower sft.learning_rate"


class Imitator:
    """Trains batches of examples on one rank."""

    def __init__(self, stepper: Stepper, reader: PromptReader, settings: LearnerSettings) -> None:
        self._stepper = stepper
        self._reader = reader
        self._settings = settings

    def imitate(self, batch: Sequence[Example], version: int) -> ImitationMetrics:
        """`version`: of the weights before this step. Raises `LearnerError`; the weights are then
        those of before."""
        started = time.perf_counter()
        stepper, config = self._stepper, self._settings.learner
        refuse(stepper, "" if batch else "a supervised step needs at least one example")
        targets = on_all_ranks(stepper, lambda: self._targets(batch))
        prompts = self._share(batch)
        sizes = self._sizes(batch, prompts, targets)
        plan = plan_rows(sizes, world=stepper.world, budget=config.tokens_per_micro_batch)
        mine = plan.ranks[stepper.rank]
        prompts = self._read(batch, [row.group for one in mine for row in one.rows], prompts)
        groups = {i: _as_sampled(batch[i], prompts[i], targets[i], version) for i in prompts}
        tokens = sum(map(len, targets))
        loss = torch.zeros((), device=stepper.device, dtype=torch.float64)
        for number, one in enumerate(mine):
            advantages = [[0.0]] * len(batch)  # there is nothing to compare an answer with
            rows = build_rows(one, groups, prompts, advantages, self._reader.blank)
            rows = rows.to(stepper.device)
            logprobs, _ = stepper.score(rows, read_images(stepper, self._reader, rows))
            part = -logprobs[rows.trained].sum() / tokens
            stepper.backward(part, last=number == len(mine) - 1)
            loss += part.detach()
        refuse_not_finite(stepper, "loss", float(loss), version, _HINT)
        rate = learning_rate(config, version, self._settings.total_steps)
        norm = stepper.step(rate)
        refuse_not_finite(stepper, "gradient's norm", norm, version, _HINT)
        return ImitationMetrics(
            loss=float(stepper.reduce(loss, "sum")),
            gradient_norm=norm,
            learning_rate=rate,
            tokens=tokens,
            seconds=time.perf_counter() - started,
        )

    def _targets(self, batch: Sequence[Example]) -> list[tuple[int, ...]]:
        tokenizer = self._reader.processor.tokenizer
        return [target_token_ids(tokenizer, example) for example in batch]

    def _share(self, batch: Sequence[Example]) -> dict[int, PromptInputs]:
        """This rank's share of the reading: images are decoded before it is known who runs what."""
        share = range(self._stepper.rank, len(batch), self._stepper.world)
        return self._read(batch, share, {})

    def _read(
        self, batch: Sequence[Example], wanted: Sequence[int], known: Mapping[int, PromptInputs]
    ) -> dict[int, PromptInputs]:
        """The prompts of `wanted`, those that are not `known` read now."""

        def read() -> dict[int, PromptInputs]:
            self._reader.read_images(batch[i].request for i in wanted)
            return {i: known.get(i) or self._reader.inputs(batch[i].request) for i in wanted}

        return on_all_ranks(self._stepper, read)

    def _sizes(
        self,
        batch: Sequence[Example],
        prompts: Mapping[int, PromptInputs],
        targets: Sequence[Sequence[int]],
    ) -> list[GroupSize]:
        """Of all examples, each prompt's measured by the rank that has read it."""
        lengths = torch.zeros(len(batch), dtype=torch.long, device=self._stepper.device)
        for index, prompt in prompts.items():
            lengths[index] = len(prompt.token_ids)
        return [
            GroupSize(
                prompt=length,
                completions=((0, len(target)),),
                images=len(example.request.prompt.images),
            )
            for length, target, example in zip(
                self._stepper.reduce(lengths, "sum").tolist(), targets, batch, strict=True
            )
        ]


def target_token_ids(tokenizer: Any, example: Example) -> tuple[int, ...]:
    """The target's tokens and the one that ends an assistant's turn, at which vLLM stops: the
    tokenizer's `eos_token` (`<|im_end|>` of Qwen's chat models). Raises `LearnerError` for a target
    that holds a special token: it would end its own turn, or stand for pixels it does not have."""
    ids: list[int] = tokenizer(example.target, add_special_tokens=False)["input_ids"]
    if special := sorted(set(ids) & set(tokenizer.all_special_ids)):
        named = ", ".join(tokenizer.convert_ids_to_tokens(special))
        raise LearnerError(
            f"prompt {example.request.prompt.id}: the answer to imitate holds special tokens "
            f"({named}); remove them from the data"
        )
    return (*ids, tokenizer.eos_token_id)


def _as_sampled(
    example: Example, prompt: PromptInputs, target: tuple[int, ...], version: int
) -> ScoredGroup:
    """The example as a group of one completion, for the rows; its sampler's log-probs are void."""
    sampling = replace(example.request.sampling, num_completions=1, temperature=1.0)
    completion = Completion(
        token_ids=target,
        logprobs=(0.0,) * len(target),
        text=example.target,
        finish_reason="stop",
        version=version,
    )
    group = Group(
        request=replace(example.request, sampling=sampling),
        prompt_token_ids=tuple(prompt.token_ids.tolist()),
        image_hashes=prompt.images,
        completions=(completion,),
        engine=0,
        seconds=0.0,
    )
    nothing = Score(components={}, total=0.0, outcome="ok")
    return ScoredGroup(group=group, scores=(nothing,), seconds=0.0)
