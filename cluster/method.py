"""What `run.method` and the number of prompts make of a config, before a run starts.

Supervised fine-tuning is the baseline GRPO is measured against: the same data, model, learner
ranks, checkpoints and evaluations; only a step differs. The answer in the mode's form is the
target, and the prompt is masked.
"""

from __future__ import annotations

import math

from medrl.configs.errors import UserError
from medrl.configs.schema import Config
from medrl.rewards.modes import get_mode


def for_method(config: Config) -> Config:
    """Of a supervised run, section sft in place of the learner's own numbers.

    Raises `UserError` where the mode wants more than an answer: no data set has the reasoning."""
    if config.run.method != "sft":
        return config
    if get_mode(config.data.mode).blocks != ("answer",):
        raise UserError(
            f"data.mode: got {config.data.mode!r} for supervised fine-tuning; the data holds "
            'answers and no reasoning to imitate, set data.mode = "no-think"'
        )
    sft = config.sft
    learner = {
        "learning_rate": sft.learning_rate,
        "schedule": sft.schedule,
        "warmup_steps": sft.warmup_steps,
        "kl_coefficient": 0.0,  # else a reference would be loaded for nothing
    }
    return config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update={"prompts": sft.prompts, "staleness": 0}),
            "learner": config.learner.model_copy(update=learner),
        }
    )


def with_steps(config: Config, num_prompts: int) -> Config:
    """`run.steps` of a run that goes by epochs of `num_prompts`; others keep theirs."""
    if config.run.method == "sft":
        steps = config.sft.steps or math.ceil(num_prompts / config.rollout.prompts)
    elif config.run.epochs:
        steps = math.ceil(config.run.epochs * num_prompts / config.rollout.prompts)
    else:
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"steps": steps})})
