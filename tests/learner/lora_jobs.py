"""What the processes of `test_lora_ranks` do: real DeepSpeed ranks that train adapters."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from made_groups import mixed_batch
from rank_jobs import STAGES, Ranks, going_on, gradients
from torch import Tensor, nn

from medrl.configs.errors import CheckpointError
from medrl.configs.schema import ModelConfig
from medrl.learner import deepspeed_engine, lora

RANK = 4
GOING_ON = ((0, "float32"), (2, "float32"), (3, "float32"), (3, "bfloat16"))


def attach_trained(vlm: nn.Module, config: ModelConfig, seed: int) -> lora.Adapters | None:
    """As `attach`, but B is not 0: the model is no longer the starting model."""
    adapters = lora.attach(vlm, config, seed)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in vlm.named_parameters():
        if ".lora_B." in name:
            values = 0.02 * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(values)
    return adapters


class Attaching:
    """Stands for the module `lora` in the engine: ranks start from trained adapters."""

    attach = staticmethod(attach_trained)


def own_values(rank: Any) -> dict[str, Tensor]:
    """Parameters as the learner has them, not merged."""
    named = dict(rank._policy.vlm.named_parameters())
    with rank._source.gather(list(named.values())):
        return {name: parameter.detach().clone() for name, parameter in named.items()}


def steps(ranks: Ranks, **changes: Any) -> dict[str, Any]:
    """What two updates change."""
    rank = ranks.make(zero_stage=3, lora_rank=RANK, learning_rate=1e-2, **changes)
    before, merged = own_values(rank), rank.values()
    for _ in range(2):
        rank.update(mixed_batch(rank._reader))
    after, merged_after = own_values(rank), rank.values()
    return {
        "changed": {name for name in before if not before[name].equal(after[name])},
        "merged changed": {name for name in merged if not merged[name].equal(merged_after[name])},
        "names": set(before),
        "dtypes": {str(tensor.dtype) for tensor in (after | merged_after).values()},
    }


def reference(ranks: Ranks, stage: int) -> dict[str, Any]:
    """Log-probs of policy and reference, and how many models were loaded for both."""
    loaded = []
    load = deepspeed_engine.models.load_policy

    def counting(*arguments: Any, **options: Any) -> Any:
        loaded.append(arguments)
        return load(*arguments, **options)

    deepspeed_engine.models.load_policy = counting
    try:
        rank = ranks.make(zero_stage=stage, lora_rank=RANK, kl_coefficient=0.1)
    finally:
        deepspeed_engine.models.load_policy = load
    groups = [one.group for one in mixed_batch(rank._reader)]
    policy = [rank.logprobs(group) for group in groups]
    rank.score = partial(rank.score, reference=True)
    start = [rank.logprobs(group) for group in groups]
    return {"policy": policy, "reference": start, "loaded": len(loaded)}


def other_rank(ranks: Ranks, folder: Path) -> str:
    """A checkpoint without adapters in the tower, for a rank with."""
    rank = ranks.make(zero_stage=3, lora_rank=RANK + 1, lora_vision=True)
    try:
        rank.load(folder)
    except CheckpointError as error:
        return str(error)
    return ""


def exported(ranks: Ranks, folder: Path) -> dict[str, Any]:
    rank = ranks.make(zero_stage=3, lora_rank=RANK, lora_vision=True, learning_rate=1e-2)
    batch = mixed_batch(rank._reader)
    rank.update(batch)
    rank.export(folder)
    return {"logprobs": [rank.logprobs(one.group) for one in batch], "weights": rank.weights()}


def lora_jobs(ranks: Ranks, out: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    if ranks.world == 2:
        for stage, dtype in GOING_ON:
            folder = out / f"stage{stage}{dtype}"
            folder.mkdir(exist_ok=True)
            results[f"going on {stage} {dtype}"] = going_on(
                ranks, folder, stage, dtype, lora_rank=RANK
            )
        results["other rank"] = other_rank(ranks, out / "stage3float32")
        results["exported"] = exported(ranks, out / "export")
        results["steps"] = steps(ranks)
        results["steps tower"] = steps(ranks, lora_vision=True)
        results["steps bfloat16"] = steps(ranks, dtype="bfloat16")
    deepspeed_engine.lora = Attaching  # type: ignore[assignment]
    for stage in STAGES:
        results[f"zero {stage}"] = gradients(ranks, zero_stage=stage, lora_rank=RANK)
    if ranks.world == 1:
        return results
    chosen: dict[str, Any] = {"zero_stage": 3, "lora_rank": RANK}
    results["tower"] = gradients(ranks, lora_vision=True, **chosen)
    results["checkpointed"] = gradients(ranks, gradient_checkpointing=True, **chosen)
    results["checkpointed tower"] = gradients(
        ranks, gradient_checkpointing=True, lora_vision=True, **chosen
    )
    results["one group"] = gradients(ranks, groups=1, **chosen)
    results["bfloat16"] = gradients(ranks, dtype="bfloat16", **chosen)
    for stage in (0, 3):
        results[f"reference {stage}"] = reference(ranks, stage)
    return results
