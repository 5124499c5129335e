"""The tensors of one micro-batch, and how rows become them. torch only.

Letters: B rows, S completions (slots) a row, C completion tokens, T prompt tokens; padded prompts
and completions are padded on the right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from medrl.actors.types import ScoredGroup
from medrl.learner.rows import MicroBatch, Row


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptInputs:
    """A prompt as the model takes it."""

    token_ids: Tensor  # [T]
    positions: Tensor  # [3, T] M-RoPE: time, height, width
    next_position: int  # of the first token after the prompt, the same on all three axes
    images: tuple[str, ...]  # hashes, in order


@dataclass(frozen=True, slots=True, kw_only=True)
class BlankImage:
    """Keeps the vision tower running where no row has an image; nothing attends to it."""

    hash: str
    token_id: int  # the image placeholder
    tokens: int  # visual tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBatch:
    """What the model reads, and what the loss needs beside the model's output."""

    input_ids: Tensor  # [B, T+S*C]
    positions: Tensor  # [3, B, T+S*C]
    prompt_lengths: Tensor  # [B] without padding
    targets: Tensor  # [B, S, C] completion tokens
    present: Tensor  # [B, S, C] bool: computed
    trained: Tensor  # [B, S, C] bool: present, and not there to keep other ranks company
    sampler: Tensor  # [B, S, C] log-probs under the sampling policy, 0 where not trained
    advantages: Tensor  # [B, S]
    versions: Tensor  # [B, S] the weights each completion was sampled from
    temperatures: Tensor  # [B]
    images: tuple[str, ...]  # a hash for every image of the rows, in order
    rows: tuple[Row, ...]

    @property
    def slots(self) -> int:
        return self.targets.shape[1]

    @property
    def length(self) -> int:
        """C"""
        return self.targets.shape[2]

    @property
    def prompt(self) -> int:
        """T, padded"""
        return self.input_ids.shape[1] - self.slots * self.length

    def to(self, device: torch.device) -> RowBatch:
        tensors: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)


def build_rows(
    micro_batch: MicroBatch,
    batch: Sequence[ScoredGroup] | Mapping[int, ScoredGroup],
    prompts: Mapping[int, PromptInputs],
    advantages: Sequence[Sequence[float]],
    blank: BlankImage,
) -> RowBatch:
    """`prompts` by index in `batch`, which needs to hold the rows' groups; `advantages` [P][G]."""
    if not micro_batch.rows:
        return _company(blank, vision=micro_batch.vision)
    rows = micro_batch.rows
    of_row = [prompts[row.group] for row in rows]
    images = tuple(image for prompt in of_row for image in prompt.images)
    extra = blank.tokens if micro_batch.vision and not images else 0
    completions = [[batch[row.group].group.completions[i] for i in row.completions] for row in rows]
    shape = (
        len(rows),
        max(len(mine) for mine in completions),
        max(len(completion.token_ids) for mine in completions for completion in mine),
    )
    result = _empty(shape, max(len(prompt.token_ids) for prompt in of_row) + extra)
    for b, (row, prompt) in enumerate(zip(rows, of_row, strict=True)):
        _place_prompt(result, b, prompt)
        result.temperatures[b] = batch[row.group].group.request.sampling.temperature or 1.0
        for s, (index, completion) in enumerate(zip(row.completions, completions[b], strict=True)):
            tokens = len(completion.token_ids)
            result.targets[b, s, :tokens] = torch.tensor(completion.token_ids)
            result.sampler[b, s, :tokens] = torch.tensor(completion.logprobs)
            result.present[b, s, :tokens] = True
            result.advantages[b, s] = advantages[row.group][index]
            result.versions[b, s] = completion.version
    if extra:
        # In the padding of a prompt: its own tokens come before, and completions do not see it.
        result.input_ids[0, result.prompt - extra : result.prompt] = blank.token_id
        images = (blank.hash,)
    result.input_ids[:, result.prompt :] = result.targets.flatten(1)
    result.trained.copy_(result.present)
    return replace(result, images=images, rows=rows)


def _empty(shape: tuple[int, int, int], prompt: int) -> RowBatch:
    rows, slots, length = shape
    total = prompt + slots * length
    return RowBatch(
        input_ids=torch.zeros(rows, total, dtype=torch.long),
        positions=torch.zeros(3, rows, total, dtype=torch.long),
        prompt_lengths=torch.ones(rows, dtype=torch.long),
        targets=torch.zeros(shape, dtype=torch.long),
        present=torch.zeros(shape, dtype=torch.bool),
        trained=torch.zeros(shape, dtype=torch.bool),
        sampler=torch.zeros(shape),
        advantages=torch.zeros(rows, slots),
        versions=torch.zeros(rows, slots, dtype=torch.long),
        temperatures=torch.ones(rows),
        images=(),
        rows=(),
    )


def _place_prompt(result: RowBatch, b: int, prompt: PromptInputs) -> None:
    tokens = len(prompt.token_ids)
    result.input_ids[b, :tokens] = prompt.token_ids
    result.positions[:, b, :tokens] = prompt.positions
    result.prompt_lengths[b] = tokens
    # Every completion goes on from the prompt's end, on all three axes.
    following = prompt.next_position + torch.arange(result.length)
    result.positions[:, b, result.prompt :] = following.repeat(result.slots)


def _company(blank: BlankImage, *, vision: bool) -> RowBatch:
    """One prompt token, one completion token, nothing trained; runs every module once."""
    extra = blank.tokens if vision else 0
    result = _empty((1, 1, 1), 1 + extra)
    result.present[:] = True
    result.input_ids[0, 1 : 1 + extra] = blank.token_id
    return replace(result, images=(blank.hash,) if vision else ())
