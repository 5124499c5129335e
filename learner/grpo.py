"""The maths of GRPO and its variants: tensors in, tensors out. Imports only torch.

Letters: P prompts, G completions a prompt, B completions of a micro-batch, C completion tokens.
A mask is boolean, True where a token (or a completion) is trained; padding and failed completions
are False. Every mean divides by a `Denominators` counted over the whole optimiser batch, so losses
of parts of a batch add up to the loss of the batch, however it is split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

STANDARD_DEVIATION_FLOOR = 1e-4
"""Added to a group's standard deviation, as TRL does: a nearly constant group is not blown up."""

MAX_LOG_RATIO = 20.0
"""exp of a larger log-ratio nears float32's limits; no ratio that matters is this large."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Which variant of GRPO: the fields of `configs.schema.LearnerConfig` of the same names."""

    ratio: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregation: Literal["completion_mean", "token_mean", "constant"] = "completion_mean"
    kl_coefficient: float = 0.0
    importance_cap: float = 0.0  # 0: off
    max_tokens: int = 1  # longest completion, for aggregation "constant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Denominators:
    """Counts over the whole optimiser batch, all ranks and micro-batches; failed ones left out."""

    completions: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """What one micro-batch adds. `loss` carries the gradient; the rest is for metrics."""

    loss: Tensor  # scalar; the batch's loss is the sum over its micro-batches
    kl_sum: Tensor  # scalar, summed over trained tokens, nats
    clipped_sum: Tensor  # scalar, count of trained tokens whose ratio was clipped
    importance_sum: Tensor  # scalar, summed over trained tokens


def zero_variance(rewards: Tensor, valid: Tensor) -> Tensor:
    """[P] True where all valid rewards of a group [P, G] are equal (or none is valid)."""
    highest = rewards.masked_fill(~valid, -torch.inf).amax(-1)
    lowest = rewards.masked_fill(~valid, torch.inf).amin(-1)
    return highest <= lowest


def group_advantages(
    rewards: Tensor,
    valid: Tensor,
    kind: Literal["standardized", "centered", "leave_one_out"] = "standardized",
) -> Tensor:
    """Compare each completion with its group; [P, G] float, 0 where not `valid`.

    With r the valid rewards of a group, n their number:
      standardized   (r - mean r) / (std r + 1e-4), std with n - 1   GRPO, arXiv 2402.03300
      centered       r - mean r                                      Dr. GRPO, arXiv 2503.20783
      leave_one_out  r - mean of the others = n/(n-1) (r - mean r)   RLOO, arXiv 2402.14740
    A group of equal rewards, or with fewer than two valid ones, is exactly 0.
    """
    count = valid.sum(-1, keepdim=True)  # [P, 1]
    mean = (rewards * valid).sum(-1, keepdim=True) / count.clamp(min=1)
    centered = (rewards - mean).masked_fill(~valid, 0.0)
    others = (count - 1).clamp(min=1)
    if kind == "standardized":
        deviation = (centered.square().sum(-1, keepdim=True) / others).sqrt()
        advantages = centered / (deviation + STANDARD_DEVIATION_FLOOR)
    elif kind == "leave_one_out":
        advantages = centered * count / others
    else:
        advantages = centered
    # Not left to rounding: the mean of equal floats may differ from them in the last bit.
    return advantages.masked_fill(zero_variance(rewards, valid)[:, None], 0.0)


def importance_ratio(log_ratio: Tensor, mask: Tensor, ratio: str) -> Tensor:
    """exp of the log-ratio: [B, C] a token, or [B, 1] a completion's geometric mean.

    token: pi(t)/pi_old(t), GRPO. sequence: (prod_t pi(t)/pi_old(t))^(1/C), GSPO, arXiv 2507.18071.
    """
    if ratio == "sequence":
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(1)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic surrogate, arXiv 1707.06347: -min(w A, clip(w, 1-low, 1+high) A).

    `ratio` [B, C] or [B, 1], `advantages` [B, 1]. Returns the surrogate and whether it was clipped
    (then its gradient is 0), both shaped as `ratio`.
    """
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    was_clipped = ((ratio < 1 - clip_low) & (advantages < 0)) | (
        (ratio > 1 + clip_high) & (advantages > 0)
    )
    return -torch.min(ratio * advantages, clipped * advantages), was_clipped


def kl_estimate(logprobs: Tensor, reference: Tensor) -> Tensor:
    """k3 of KL(policy || reference) a token: exp(d) - d - 1 with d = reference - policy; >= 0.

    Unbiased under the policy's own samples; Schulman, "Approximating KL divergence", 2020.
    """
    difference = (reference - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return difference.exp() - difference - 1


def truncated_importance(learner: Tensor, sampler: Tensor, cap: float) -> Tensor:
    """min(pi_learner / pi_sampler, cap) a token, a constant: corrects for who sampled. [B, C]"""
    log_ratio = (learner - sampler).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp().clamp(max=cap)


def aggregate(
    per_token: Tensor, mask: Tensor, objective: Objective, denominators: Denominators
) -> Tensor:
    """Sum [B, C] into this part's share of the batch's loss, a scalar.

    completion_mean  mean over a completion's tokens, then over completions   GRPO
    token_mean       mean over all tokens of the batch                        DAPO, 2503.14476
    constant         sum / (completions * max_tokens)                         Dr. GRPO
    """
    if objective.aggregation == "token_mean":
        return (per_token * mask).sum() / max(denominators.tokens, 1)
    sums = (per_token * mask).sum(-1)  # [B]
    if objective.aggregation == "constant":
        return sums.sum() / (max(denominators.completions, 1) * objective.max_tokens)
    return (sums / mask.sum(-1).clamp(min=1)).sum() / max(denominators.completions, 1)


def grpo_loss(
    logprobs: Tensor,
    old: Tensor,
    sampler: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    objective: Objective,
    denominators: Denominators,
) -> LossTerms:
    """GRPO's loss of one micro-batch.

    `logprobs`, `old`, `sampler`, `reference`, `mask` are [B, C], `advantages` [B]. `old` is the
    learner's policy at the start of the batch (without gradient), `sampler` the policy that drew
    the tokens, `reference` the starting model's (None: no KL term).
    """
    ratio = importance_ratio(logprobs - old.detach(), mask, objective.ratio)
    per_token, was_clipped = clipped_surrogate(
        ratio, advantages[:, None], objective.clip_low, objective.clip_high
    )
    weights = torch.ones_like(logprobs)
    if objective.importance_cap:
        weights = truncated_importance(old, sampler, objective.importance_cap)
        per_token = per_token * weights
    per_token, kl = per_token.expand_as(logprobs), torch.zeros_like(logprobs)
    if reference is not None:
        kl = kl_estimate(logprobs, reference.detach())
        per_token = per_token + objective.kl_coefficient * kl
    return LossTerms(
        loss=aggregate(per_token, mask, objective, denominators),
        kl_sum=(kl.detach() * mask).sum(),
        clipped_sum=(was_clipped.expand_as(mask) & mask).sum(),
        importance_sum=(weights * mask).sum(),
    )
