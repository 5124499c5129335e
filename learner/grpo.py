"""The maths of GRPO and its variants: tensors in, tensors out. Imports only torch.

Letters: P prompts, G completions a prompt, B completions of a micro-batch, C completion tokens.
A mask is True where a token (or completion) is trained: not padding, not left out. Means divide by
`Denominators` counted over the whole optimiser batch, so the losses of its parts add up to its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medrl.learner.objective import Denominators, LossTerms, Objective

STANDARD_DEVIATION_FLOOR = 1e-4  # as in TRL: a nearly constant group is not blown up
MAX_LOG_RATIO = 20.0  # exp of a larger one nears float32's limit; none that matters is this large


def zero_variance(rewards: Tensor, valid: Tensor) -> Tensor:
    """[P] True where all valid rewards of a group [P, G] are equal, or none is valid."""
    highest = rewards.masked_fill(~valid, -torch.inf).amax(-1)
    return highest <= rewards.masked_fill(~valid, torch.inf).amin(-1)


def group_advantages(rewards: Tensor, valid: Tensor, kind: str = "standardized") -> Tensor:
    """Compare each completion with its group; [P, G], 0 where not `valid`. r: the n valid rewards.

      standardized   (r - mean r) / (std r + 1e-4), std with n - 1   GRPO, arXiv 2402.03300
      centered       r - mean r                                      Dr. GRPO, arXiv 2503.20783
      leave_one_out  r - mean of the others = n/(n-1) (r - mean r)   RLOO, arXiv 2402.14740
    A group of equal rewards, or with fewer than two valid ones, is exactly 0."""
    count = valid.sum(-1, keepdim=True)  # [P, 1]
    mean = (rewards * valid).sum(-1, keepdim=True) / count.clamp(min=1)
    advantages = (rewards - mean).masked_fill(~valid, 0.0)
    others = (count - 1).clamp(min=1)
    if kind == "standardized":
        deviation = (advantages.square().sum(-1, keepdim=True) / others).sqrt()
        advantages = advantages / (deviation + STANDARD_DEVIATION_FLOOR)
    elif kind == "leave_one_out":
        advantages = advantages * count / others
    # Not left to rounding: the mean of equal floats may differ from them in the last bit.
    return advantages.masked_fill(zero_variance(rewards, valid)[:, None], 0.0)


def importance_ratio(log_ratio: Tensor, mask: Tensor, ratio: str) -> Tensor:
    """[B, C] a token: pi/pi_old. Or [B, 1] their geometric mean, GSPO, arXiv 2507.18071."""
    if ratio == "sequence":
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(1)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's -min(w A, clip(w, 1-low, 1+high) A), arXiv 1707.06347, and where its gradient is cut.
    `ratio` w is [B, C] or [B, 1], `advantages` A is [B, 1]."""
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    too_low, too_high = ratio < 1 - clip_low, ratio > 1 + clip_high
    return -surrogate, (too_low & (advantages < 0)) | (too_high & (advantages > 0))


def cispo_surrogate(
    ratio: Tensor, advantages: Tensor, logprobs: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """CISPO's -sg(clip(w, 1-low, 1+high)) A log p, arXiv 2506.13585, and where w was clipped: that
    bounds a token's gradient and never cuts it. Shapes as in `clipped_surrogate`."""
    weight = ratio.clamp(1 - clip_low, 1 + clip_high).detach()
    return -weight * advantages * logprobs, weight != ratio


def kl_estimate(logprobs: Tensor, reference: Tensor) -> Tensor:
    """k3 of KL(policy || reference) a token: exp(d) - d - 1 with d = reference - policy; >= 0.
    Schulman, "Approximating KL divergence", 2020."""
    difference = (reference - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return difference.exp() - difference - 1


def truncated_importance(learner: Tensor, sampler: Tensor, cap: float) -> Tensor:
    """min(pi_learner / pi_sampler, cap) a token [B, C], a constant: corrects for who sampled."""
    log_ratio = (learner - sampler).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp().clamp(max=cap)


def aggregate(values: Tensor, mask: Tensor, objective: Objective, counts: Denominators) -> Tensor:
    """This part's share of the batch's loss, a scalar; `values`, `mask` [B, C]:

    completion_mean  mean over a completion's tokens, then over completions   GRPO
    token_mean       mean over all tokens of the batch                        DAPO, 2503.14476
    constant         sum / (completions * max_tokens)                         Dr. GRPO"""
    sums = (values * mask).sum(-1)  # [B]
    if objective.aggregation == "token_mean":
        return sums.sum() / max(counts.tokens, 1)
    if objective.aggregation == "constant":
        return sums.sum() / (max(counts.completions, 1) * objective.max_tokens)
    return (sums / mask.sum(-1).clamp(min=1)).sum() / max(counts.completions, 1)


def grpo_loss(
    logprobs: Tensor,  # [B, C] of the policy that learns; the only one with a gradient
    old: Tensor,  # [B, C] of the same policy at the start of the batch
    sampler: Tensor,  # [B, C] of the policy that drew the tokens
    reference: Tensor | None,  # [B, C] of the starting model; None: no KL term
    advantages: Tensor,  # [B]
    mask: Tensor,  # [B, C]
    objective: Objective,
    counts: Denominators,
) -> LossTerms:
    """The surrogate [* truncated importance] [+ beta * KL], aggregated.

    KL is k3 ("paper") or w k3 ("unbiased": of the same value at w = 1, but its gradient is that of
    the KL itself; DeepSeek-V3.2, arXiv 2512.02556, and TRL's default)."""
    clip_low, clip_high = objective.clip_low, objective.clip_high
    ratio = importance_ratio(logprobs - old.detach(), mask, objective.ratio)
    shared = advantages[:, None]  # by a completion's tokens
    if objective.surrogate == "cispo":
        per_token, clipped = cispo_surrogate(ratio, shared, logprobs, clip_low, clip_high)
    else:
        per_token, clipped = clipped_surrogate(ratio, shared, clip_low, clip_high)
    weights, kl = torch.ones_like(logprobs), torch.zeros_like(logprobs)
    if objective.importance_cap:
        weights = truncated_importance(old, sampler, objective.importance_cap)
    if reference is not None:
        kl = kl_estimate(logprobs, reference.detach())
    penalty = kl * ratio if objective.kl_gradient == "unbiased" else kl
    per_token = per_token * weights + objective.kl_coefficient * penalty
    return LossTerms(
        loss=aggregate(per_token, mask, objective, counts),
        kl_sum=(kl.detach() * mask).sum(),
        clipped_sum=(clipped & mask).sum(),
        importance_sum=(weights * mask).sum(),
    )
