"""What the maths of GRPO takes and gives beside tensors. Imports only torch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Which variant of GRPO: the fields of `configs.schema.LearnerConfig` of the same names."""

    ratio: str = "token"
    surrogate: str = "clipped"
    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregation: str = "completion_mean"
    kl_coefficient: float = 0.0
    kl_gradient: str = "unbiased"
    importance_cap: float = 0.0  # 0: off
    max_tokens: int = 1  # longest completion, for aggregation "constant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Denominators:
    """Counts over the whole optimiser batch, all ranks and micro-batches: the trained ones only."""

    completions: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """What one micro-batch adds, scalars; sums are over trained tokens."""

    loss: Tensor  # the only one with a gradient
    kl_sum: Tensor  # nats
    clipped_sum: Tensor  # tokens whose ratio was clipped
    importance_sum: Tensor
