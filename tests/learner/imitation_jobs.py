"""What the processes of `test_imitation_ranks` do: supervised steps on real DeepSpeed ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from made_groups import examples
from rank_jobs import STAGES, Ranks

from medrl.configs.errors import LearnerError


def imitated(ranks: Ranks, *, one: bool = False, **changes: Any) -> dict[str, Any]:
    rank = ranks.make(**changes)
    metrics = rank.imitate(examples()[1:2] if one else examples())
    return {"metrics": metrics, "gradients": rank.gradients}


def imitation_refused(ranks: Ranks) -> dict[str, Any]:
    """An image is missing for the one rank that reads it first; then the weights of one rank are
    no numbers. All ranks must say so, and an unbroken batch must go on as if nothing had been."""
    rank = ranks.make(zero_stage=3)
    broken = examples()
    request = broken[1].request  # of rank 1's share
    gone = replace(request, prompt=replace(request.prompt, images=("gone.png",)))
    broken[1] = replace(broken[1], request=gone)
    before, errors = rank.values(), []
    for batch, factor in ((broken, 1.0), (examples(), float("nan"))):
        rank.factor = factor if ranks.rank == ranks.world - 1 else 1.0
        try:
            rank.imitate(batch)
        except LearnerError as error:
            errors.append(str(error))
    rank.factor = 1.0
    after = rank.values()
    return {
        "errors": errors,
        "kept": all(after[name].equal(before[name]) for name in before),
        "metrics": rank.imitate(examples()),
    }


def imitation_jobs(ranks: Ranks, _: Path) -> dict[str, Any]:
    results: dict[str, Any] = {
        f"zero {stage}": imitated(ranks, zero_stage=stage) for stage in STAGES
    }
    results["bfloat16"] = imitated(ranks, zero_stage=3, dtype="bfloat16")
    if ranks.world == 2:
        results["one"] = imitated(ranks, one=True, zero_stage=3)
        results["refused"] = imitation_refused(ranks)
    return results
