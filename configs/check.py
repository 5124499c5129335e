"""Values that are right alone and wrong together. Pure: looks at no file and no machine."""

from __future__ import annotations

from collections import Counter

from medrl.configs.schema import Config


def contradictions(config: Config) -> list[str]:
    """A sentence for each contradiction; empty when there is none."""
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
    if placement.colocate and rollout.staleness:
        problems.append(
            f"rollout.staleness: got {rollout.staleness} with placement.colocate; engines that "
            "sleep while the learner works are never ahead of it, set it to 0"
        )
    if placement.colocate and (
        placement.engines != placement.learners or placement.gpus_per_engine != 1
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
