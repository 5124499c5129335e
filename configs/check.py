"""Values that are right alone and wrong together. Pure: looks at no file and no machine."""

from __future__ import annotations

from collections import Counter

from medrl.configs.schema import Config, DataConfig

MODES = ("think-before", "no-think", "think-after")

LEAST_BFLOAT16_GAP = 1e-3
"""Nats: no gate on the mean gap of bfloat16 can be below, for rounding alone is more (2**-8 of a
logit)."""

LEAST_BFLOAT16_MAX_GAP = 0.1
"""Nats: likewise of the largest gap of a batch. A canary of a few tokens may be as far off."""


def contradictions(config: Config) -> list[str]:
    """A sentence for each contradiction; empty when there is none."""
    return [
        *_of_data(config.data),
        *_of_rollout(config),
        *_of_placement(config),
        *_of_weights(config),
        *_of_rewards(config),
    ]


def _of_rollout(config: Config) -> list[str]:
    rollout, learner, placement = config.rollout, config.learner, config.placement
    problems = []
    parts = placement.learners * learner.updates_per_batch
    if rollout.prompts % parts:
        problems.append(
            f"rollout.prompts: got {rollout.prompts}, needs a multiple of {parts} "
            f"(placement.learners {placement.learners} x learner.updates_per_batch "
            f"{learner.updates_per_batch}), so that every rank has work in every update"
        )
    if rollout.max_tokens >= rollout.max_model_len:
        problems.append(
            f"rollout.max_tokens: got {rollout.max_tokens}, needs less than rollout.max_model_len "
            f"({rollout.max_model_len}), which holds prompt and completion"
        )
    if config.reward.overlong_tokens > rollout.max_tokens:
        problems.append(
            f"reward.overlong_tokens: got {config.reward.overlong_tokens}, needs at most "
            f"rollout.max_tokens ({rollout.max_tokens}), for they are the last of these"
        )
    if rollout.staleness and not learner.importance_cap:
        problems.append(
            f"learner.importance_cap: got 0 with rollout.staleness {rollout.staleness}; stale "
            "completions need an importance correction, e.g. learner.importance_cap = 2.0"
        )
    if learner.importance_cap and (rollout.top_p < 1 or rollout.top_k):
        problems.append(
            "learner.importance_cap: the correction needs the sampler's full distribution; set "
            f"rollout.top_p = 1.0 (got {rollout.top_p}) and rollout.top_k = 0 (got {rollout.top_k})"
        )
    return problems


def _of_placement(config: Config) -> list[str]:
    rollout, placement = config.rollout, config.placement
    problems = []
    if placement.colocate and rollout.staleness:
        problems.append(
            f"rollout.staleness: got {rollout.staleness} with placement.colocate; engines that "
            "sleep while the learner works are never ahead of it, set it to 0"
        )
    if placement.colocate and (
        (placement.min_engines, placement.max_engines) != (placement.learners, placement.learners)
        or placement.gpus_per_engine != 1
    ):
        problems.append(
            f"placement.colocate: needs one engine a rank, each on one GPU; got {placement.engines}"
            f" engines of {placement.gpus_per_engine} GPUs and {placement.learners} learners"
        )
    if placement.transport == "ipc" and not placement.colocate:
        problems.append(
            'placement.transport: "ipc" needs placement.colocate = true (engines on the '
            'learner\'s GPUs); use "nccl" or "auto"'
        )
    if placement.device == "cpu" and placement.transport in ("nccl", "ipc"):
        problems.append(
            f'placement.transport: got "{placement.transport}" with placement.device "cpu"; '
            'use "gloo" or "auto"'
        )
    if placement.device == "gpu" and placement.transport == "gloo":
        problems.append(
            'placement.transport: got "gloo" with placement.device "gpu"; use "nccl" or "auto"'
        )
    return problems


def _of_weights(config: Config) -> list[str]:
    model, placement = config.model, config.placement
    problems = []
    if model.trust_remote_code not in ("", model.path):
        problems.append(
            f"model.trust_remote_code: got {model.trust_remote_code!r}, needs model.path "
            f"({model.path!r}) itself: the code of that model, and of no other, may then run"
        )
    bfloat16 = model.dtype == "bfloat16" or (model.dtype == "auto" and placement.device == "gpu")
    least = {"mean": LEAST_BFLOAT16_GAP, "max": LEAST_BFLOAT16_MAX_GAP}
    problems += [
        f"gap.{key}: got {gate:g}, a gate for float32, with bfloat16 weights (model.dtype "
        f"{model.dtype!r}, placement.device {placement.device!r}), whose rounding alone is more; "
        f"needs at least {least[key]:g}, or 0 to choose by the type"
        for key, gate in config.gap
        if bfloat16 and 0 < gate < least[key]
    ]
    if model.lora_vision and not model.lora_rank:
        problems.append(
            "model.lora_vision: true with model.lora_rank 0, which is no adapters at all; set "
            "model.lora_rank, e.g. 16"
        )
    if model.lora_vision and model.freeze_vision:
        problems.append(
            "model.lora_vision: true with model.freeze_vision; the vision tower can have adapters "
            "or stay as it is, not both"
        )
    return problems


def _of_rewards(config: Config) -> list[str]:
    problems = []
    if config.eval.every and not config.data.test:
        problems.append("eval.every: needs held-out prompts, set data.test")
    if config.reward.policy == "medr1" and config.data.mode == "think-after":
        problems.append(
            'reward.policy: "medr1" with data.mode "think-after"; the released code has no form '
            'for it, use "strict"'
        )
    for name, count in Counter(term.use for term in config.reward.terms).items():
        if count > 1:
            problems.append(f"reward.terms: {name!r} is named {count} times; add up its weights")
    return problems


def _of_data(data: DataConfig) -> list[str]:
    problems = []
    if data.mode not in MODES and ":" not in data.mode:
        problems.append(
            f'data.mode: got "{data.mode}", needs {", ".join(map(repr, MODES))}, or the import '
            "path of a mode of yours, my_lab.modes:DESCRIBE"
        )
    if data.order == "easy_first" and not data.pass_rates:
        problems.append(
            'data.order: "easy_first" needs data.pass_rates, a file of `medrl data pass-rates`'
        )
    bounds = (data.min_pass_rate, data.max_pass_rate)
    if bounds != (0, 1) and not data.pass_rates:
        problems.append(
            f"data.min_pass_rate, data.max_pass_rate: {bounds[0]:g} and {bounds[1]:g} need "
            "data.pass_rates, a file of `medrl data pass-rates`"
        )
    if bounds[0] > bounds[1]:
        problems.append(
            f"data.min_pass_rate: got {bounds[0]:g}, above data.max_pass_rate ({bounds[1]:g})"
        )
    return problems
