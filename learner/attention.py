"""Attention of rows that share a prompt, in few calls a layer and without any change to a model.

A row is [prompt, padded to T | c1, padded to C | ... | cS]. The prompt sees itself, causally; a
completion's token sees the prompt and its own completion up to itself, and nothing else: what it
would see in a row of its own.

There are two ways to compute it. On the CPU `attention_cpu.py` does. Elsewhere, and where that
kernel does not fit, SDPA does in two calls: the prompt over itself; every completion over the
prompt's keys and values and its own, with a mask. A long completion goes in blocks of queries,
each over no later keys than it sees, for a kernel with a mask computes what it masks.
transformers' attention interface takes the function by name, and hands it the row's layout as a
keyword argument of the model's forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from medrl.learner import attention_cpu

NAME = "medrl_shared_prompt"
"""What `attn_implementation` calls it."""

LAYOUT = "shared_prompt_layout"
"""The keyword argument of a model's forward that carries a `Layout`."""


BLOCK = 128
"""Completion tokens a call: what is computed in vain is half a block a token."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How rows are laid out, the same for all rows of a micro-batch."""

    prompt_lengths: Tensor  # [B] without padding
    prompt: int  # T, padded
    slots: int  # S completions a row
    length: int  # C, padded

    @cached_property
    def inside(self) -> Tensor:
        """[B, T] bool: what of the prompt is not padding."""
        tokens = torch.arange(self.prompt, device=self.prompt_lengths.device)
        return tokens[None] < self.prompt_lengths[:, None]

    @cached_property
    def hidden(self) -> Tensor | None:
        """[B, 1, 1, T] -inf at padding of the prompt, 0 elsewhere. None: there is no padding."""
        if self.inside.all():
            return None
        scores = torch.zeros_like(self.inside, dtype=torch.float32)
        return scores.masked_fill(~self.inside, -torch.inf)[:, None, None]

    @cached_property
    def visible(self) -> Tensor:
        """[B*S, 1, C, T+C] bool: what each completion's token may see."""
        inside = self.inside[:, None, None].expand(-1, self.slots, self.length, -1)  # [B, S, C, T]
        own = torch.ones(self.length, self.length, dtype=torch.bool, device=inside.device).tril()
        own = own.expand(*inside.shape[:2], -1, -1)
        return torch.cat([inside, own], dim=-1).flatten(0, 1)[:, None]


def shared_prompt_attention(
    module: torch.nn.Module,
    query: Tensor,  # [B, H, T+S*C, D]
    key: Tensor,  # [B, H/r, T+S*C, D]
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Returns [B, T+S*C, H, D], as transformers wants it. Needs a `Layout` in `options`."""
    layout: Layout | None = options.get(LAYOUT)
    if layout is None:
        raise ValueError(f"attention {NAME!r} needs the keyword argument {LAYOUT!r}")
    if dropout or not attention_cpu.takes(query, key, value):
        return _masked(query, key, value, layout, dropout, scaling), None
    attended = attention_cpu.attend(
        query,
        key,
        value,
        prompt=layout.prompt,
        slots=layout.slots,
        hidden=layout.hidden,
        scale=scaling,
    )
    return attended, None


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """By SDPA, for any device."""
    repeats = query.shape[1] // key.shape[1]
    prompt = layout.prompt
    of_prompt = scaled_dot_product_attention(
        query[:, :, :prompt],
        _repeat_heads(key[:, :, :prompt], repeats, 1),
        _repeat_heads(value[:, :, :prompt], repeats, 1),
        dropout_p=dropout,
        is_causal=True,
        scale=scaling,
    )
    of_completions = _completions(
        _split(query[:, :, prompt:], layout.slots),
        _prompt_and_own(key, layout, repeats),
        _prompt_and_own(value, layout, repeats),
        layout,
        dropout,
        scaling,
    )  # [B*S, H, C, D]
    batch, heads, _, size = query.shape
    joined = of_completions.view(batch, layout.slots, heads, -1, size).transpose(1, 2)
    joined = joined.reshape(batch, heads, -1, size)
    return torch.cat([of_prompt, joined], dim=2).transpose(1, 2).contiguous()


def _completions(
    query: Tensor,  # [B*S, H, C, D]
    key: Tensor,  # [B*S, H, T+C, D]
    value: Tensor,
    layout: Layout,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    blocks = []
    for start in range(0, query.shape[2], BLOCK):
        queries = slice(start, start + BLOCK)
        keys = slice(layout.prompt + start + BLOCK)
        blocks.append(
            scaled_dot_product_attention(
                query[:, :, queries],
                key[:, :, keys],
                value[:, :, keys],
                attn_mask=layout.visible[:, :, queries, keys],
                dropout_p=dropout,
                scale=scaling,
            )
        )
    return torch.cat(blocks, dim=2)


def _repeat_heads(states: Tensor, repeats: int, slots: int) -> Tensor:
    """[B, H/r, T, D] -> [B*slots, H, T, D]: each head for its r queries, each row for its slots."""
    batch, heads, tokens, size = states.shape
    expanded = states[:, None, :, None].expand(batch, slots, heads, repeats, tokens, size)
    return expanded.reshape(batch * slots, heads * repeats, tokens, size)


def _split(states: Tensor, slots: int) -> Tensor:
    """[B, H, S*C, D] -> [B*S, H, C, D]"""
    batch, heads, tokens, size = states.shape
    split = states.reshape(batch, heads, slots, tokens // slots, size).transpose(1, 2)
    return split.reshape(batch * slots, heads, tokens // slots, size)


def _prompt_and_own(states: Tensor, layout: Layout, repeats: int) -> Tensor:
    """[B, H/r, T+S*C, D] -> [B*S, H, T+C, D]: the prompt's and a completion's own."""
    prompt = _repeat_heads(states[:, :, : layout.prompt], repeats, layout.slots)
    own = _repeat_heads(_split(states[:, :, layout.prompt :], layout.slots), repeats, 1)
    return torch.cat([prompt, own], dim=2)


def _no_mask(*arguments: object, **options: object) -> None:
    """The layout carries the mask; transformers is to build none."""


def register() -> None:
    """Make the attention known to transformers as `NAME`. Calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, shared_prompt_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
