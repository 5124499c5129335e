"""What a rank says where memory ends: that, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from medrl.configs.errors import LearnerError, as_death
from medrl.learner.settings import LearnerSettings


@contextmanager
def advice_on_memory(settings: LearnerSettings, rank: int) -> Iterator[None]:
    """In the block, memory that ends is a `LearnerError`: a death, for the other ranks are left in
    a collective, and a certain one. Its first line is the same whenever it comes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_of_memory(error):
            raise
        model, learner = settings.model, settings.learner
        hints = [
            f"lower learner.tokens_per_micro_batch ({learner.tokens_per_micro_batch}), "
            f"data.max_pixels ({settings.max_pixels}) or rollout.max_tokens ({settings.max_tokens})"
        ]
        if not model.gradient_checkpointing:
            hints.append("set model.gradient_checkpointing")
        if not model.lora_rank:
            hints.append("train adapters (model.lora_rank)")
        hints.append(
            "raise placement.learners"
            if learner.zero_stage == 3
            else f"raise learner.zero_stage ({learner.zero_stage})"
        )
        told = LearnerError(
            f"the learner ran out of memory; {', or '.join(hints)}\n"
            f"rank {rank}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        )
        told.certain = True
        raise as_death(told) from error


def _is_of_memory(error: Exception) -> bool:
    # torch has a full CPU be a plain RuntimeError, and cuBLAS a full GPU.
    signs = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        sign in str(error) for sign in signs
    )
