"""How DeepSpeed is set up; imports none of it."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from medrl.learner.settings import LearnerSettings


def zero_stage(settings: LearnerSettings) -> int:
    """`learner.zero_stage`, and at least 1 for bfloat16: stage 0 would train bfloat16 weights
    without a float32 copy, and small steps would vanish."""
    stage = settings.learner.zero_stage
    return max(stage, 1) if settings.dtype == "bfloat16" else stage


def zero_config(settings: LearnerSettings) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # a word only: micro-batches are ours
        "gradient_accumulation_steps": 1,  # likewise, see `DeepSpeedRank.backward`
        "gradient_clipping": settings.learner.max_gradient_norm,
        "zero_optimization": {"stage": zero_stage(settings)},
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": settings.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31,
    }


def partitioned_load(settings: LearnerSettings) -> Any:
    """Makes transformers load weights in parts, as long as the object lives."""
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(zero_config(settings))


def silence() -> None:
    """Leave out what libraries say of themselves."""
    import transformers

    # DeepSpeed uses old names of collectives; torch says so, once a micro-batch.
    warnings.filterwarnings(
        "ignore", message="`torch.distributed.*deprecated", category=FutureWarning
    )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
