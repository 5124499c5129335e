"""Attention of rows that share a prompt, on the CPU: three calls of PyTorch's flash attention.

The prompt over itself; all completions over the prompt's keys, which are neither copied nor
expanded; each completion over its own. No call needs a mask, but for prompts of different lengths.

What a completion's token sees is so in two parts. The kernel also returns the log-sum-exp of each
query's scores, and by these the two outputs are weighed into what one softmax over both gives.
Its backward pass takes output and log-sum-exp to find again each key's weight, exp(score - lse),
and the sum over keys of weight x gradient, output . gradient. Given those of the whole, it returns
a part's share of the gradient of the whole: nothing is approximated. (Ring attention does the
same with parts on several devices.)

PyTorch's public function keeps the log-sum-exp to itself, hence the private operators. They take
fewer key heads than query heads as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def takes(*states: Tensor) -> bool:
    """Whether the kernel reads such queries, keys and values; strided ones it misreads."""
    return all(x.device.type == "cpu" and x.stride(-1) == 1 for x in states)


def attend(
    query: Tensor,  # [B, H, T+S*C, D]
    key: Tensor,  # [B, H/r, T+S*C, D]
    value: Tensor,
    *,
    prompt: int,  # T
    slots: int,  # S
    hidden: Tensor | None,  # [B, 1, 1, T] -inf at padding of a prompt, else 0; None: no padding
    scale: float | None,
) -> Tensor:
    """Returns [B, T+S*C, H, D]. Sizes are of at least 1."""
    # In 16 bits the kernel would also add up in 16 bits the gradient of a key, query by query.
    wide = torch.promote_types(query.dtype, torch.float32)
    states = (x.to(wide) for x in (query, key, value))
    if hidden is not None:
        hidden = hidden.to(wide)
    out: Tensor = _SharedPrompt.apply(  # type: ignore[no-untyped-call]
        *states, prompt, slots, hidden, scale
    )
    return out.to(query.dtype)


class _SharedPrompt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt: int,
        slots: int,
        hidden: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        (q, q_after), (k, k_after), (v, v_after) = (_cut(x, prompt) for x in (query, key, value))
        own = (_apart(x, slots) for x in (q_after, k_after, v_after))
        out = _empty(query)
        of_prompt, after = _cut(out, prompt)
        of_prompt[:], lse_prompt = _flash(q, k, v, is_causal=True, scale=scale)
        over_prompt, lse_over_prompt = _flash(q_after, k, v, attn_mask=hidden, scale=scale)
        over_own, lse_own = _flash(*own, is_causal=True, scale=scale)
        lse_own = _together(lse_own, slots)
        weight = torch.sigmoid(lse_own - lse_over_prompt)[..., None]
        torch.lerp(over_prompt, _together(over_own, slots), weight, out=after)
        lse_after = torch.logaddexp(lse_own, lse_over_prompt)
        ctx.save_for_backward(query, key, value, out, lse_prompt, lse_after, hidden)
        ctx.prompt, ctx.slots, ctx.scale = prompt, slots, scale
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse_prompt, lse_after, hidden = ctx.saved_tensors
        prompt, slots, options = ctx.prompt, ctx.slots, {"dropout_p": 0.0, "scale": ctx.scale}
        (q, q_after), (k, k_after), (v, v_after), (o, o_after), (g, g_after) = (
            _cut(x, prompt) for x in (query, key, value, out, grad.transpose(1, 2))
        )
        own = (_apart(x, slots) for x in (g_after, q_after, k_after, v_after, o_after, lse_after))
        of_prompt = _flash_backward(g, q, k, v, o, lse_prompt, is_causal=True, **options)
        over_prompt = _flash_backward(
            g_after, q_after, k, v, o_after, lse_after, is_causal=False, attn_mask=hidden, **options
        )
        over_own = [_together(x, slots) for x in _flash_backward(*own, is_causal=True, **options)]
        grads = [_empty(x) for x in (query, key, value)]
        (q, q_after), *keys_and_values = (_cut(x, prompt) for x in grads)
        q[:] = of_prompt[0]
        torch.add(over_prompt[0], over_own[0], out=q_after)
        for i, (shared, after) in enumerate(keys_and_values, start=1):
            torch.add(of_prompt[i], over_prompt[i], out=shared)
            after[:] = over_own[i]
        return *grads, None, None, None, None


def _empty(like: Tensor) -> Tensor:
    """[B, H, N, D], in memory [B, N, H, D] as the kernel has it."""
    batch, heads, tokens, size = like.shape
    return like.new_empty(batch, tokens, heads, size).transpose(1, 2)


def _cut(states: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """Of the prompt and of what comes after."""
    return states[:, :, :prompt], states[:, :, prompt:]


def _apart(states: Tensor, slots: int) -> Tensor:
    """[B, H, S*C, ...] -> [B*S, H, C, ...]"""
    batch, heads, tokens, *size = states.shape
    apart = states.reshape(batch, heads, slots, tokens // slots, *size)
    return apart.transpose(1, 2).flatten(0, 1)


def _together(states: Tensor, slots: int) -> Tensor:
    """[B*S, H, C, ...] -> [B, H, S*C, ...]"""
    rows, heads, tokens, *size = states.shape
    together = states.reshape(rows // slots, slots, heads, tokens, *size)
    return together.transpose(1, 2).flatten(2, 3)
