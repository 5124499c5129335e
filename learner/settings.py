"""What a learner rank is told: its config sections and the few values it shares with others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medrl.configs.schema import LearnerConfig, ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSettings:
    """The same for all ranks of a run; small, for it crosses Ray."""

    model: ModelConfig
    learner: LearnerConfig
    image_root: Path
    max_pixels: int
    max_tokens: int  # longest completion
    total_steps: int  # batches of the whole run: where the schedule ends
    seed: int
    device: Literal["cpu", "gpu"]
    collective_timeout_s: float = 600.0  # longest wait of a rank for the others
    deterministic: bool = False  # the same batch and weights give the same update, to the last bit

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        return dtype_of(self.model, self.device)


def dtype_of(model: ModelConfig, device: Literal["cpu", "gpu"]) -> Literal["float32", "bfloat16"]:
    """What a model is computed in."""
    if model.dtype == "auto":
        return "bfloat16" if device == "gpu" else "float32"
    return model.dtype


def learning_rate(config: LearnerConfig, step: int, total_steps: int) -> float:
    """Of batch `step`, counted from 0: a linear warm-up, then the schedule, to 0 at `total_steps`.

    The first batch of a warm-up of n has 1/n of the peak; the first one after it has the peak.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    decay_steps = max(total_steps - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / decay_steps, 1.0)
    if config.schedule == "linear":
        return config.learning_rate * (1 - progress)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2
