"""What the processes of `test_frozen_tower_ranks` do: ranks that remember different images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from made_groups import mixed_batch
from rank_jobs import Ranks


def remembered(ranks: Ranks, vision_cache_gib: float, **changes: Any) -> dict[str, Any]:
    """Updates in which now the one, now the other rank has an image to encode, or both or none."""
    rank = ranks.make(freeze_vision=True, vision_cache_gib=vision_cache_gib, **changes)
    seen = [0]

    def count(module: torch.nn.Module, arguments: Any) -> None:
        seen[0] += 1

    rank._policy.vlm.model.visual.register_forward_pre_hook(count)
    batch, found = mixed_batch(rank._reader), []
    for groups in (batch[:1], batch[3:5], batch[2:3], batch, batch[::-1]):
        before = seen[0]
        metrics = rank.update(groups)
        found.append((metrics.loss, rank.gradients, seen[0] - before))
    before = seen[0]
    logprobs = [rank.logprobs(one.group) for one in batch]
    return {"updates": found, "logprobs": logprobs, "encoded by logprobs": seen[0] - before}


def vision_jobs(ranks: Ranks, out: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for stage in (2, 3):
        for gib in (0.0, 1.0):
            results[f"zero {stage}, {gib:g} GiB"] = remembered(
                ranks, gib, zero_stage=stage, kl_coefficient=0.1
            )
    results["adapters, 1 GiB"] = remembered(
        ranks, 1.0, zero_stage=3, lora_rank=4, kl_coefficient=0.1
    )
    results["adapters, 0 GiB"] = remembered(
        ranks, 0.0, zero_stage=3, lora_rank=4, kl_coefficient=0.1
    )
    return results
