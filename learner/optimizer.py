"""The optimiser over whatever of a policy is trained: all weights, or adapters. Torch only."""

from __future__ import annotations

import torch
from torch import Tensor

from medrl.configs.schema import LearnerConfig


def adamw(policy: torch.nn.Module, config: LearnerConfig) -> torch.optim.Optimizer:
    """Norms' scales and biases are not decayed."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) < 2]
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) >= 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def gradient_norm(policy: torch.nn.Module) -> Tensor:
    """Over all parameters that have a gradient."""
    gradients = [p.grad.norm() for p in policy.parameters() if p.grad is not None]
    norm: Tensor = torch.stack(gradients).norm()
    return norm
