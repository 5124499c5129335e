"""What makes the learner's arithmetic the same in every run, to the last bit. torch only.

The rest is so already: the plan of a batch follows from its token counts, and ranks add up what
they reduce in an order that follows from their number.
"""

import os

import torch


def seed_process(seed: int, *, deterministic: bool) -> None:
    """Seed torch. `deterministic`: also have every operation add up in one order, whatever its
    threads do; one that has no such order raises an error. On a GPU before its first use."""
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it
        torch.use_deterministic_algorithms(True)
        # Else whatever is allocated is written to at once, DeepSpeed's buckets of 2 GB as well.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
