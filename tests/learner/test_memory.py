"""Where memory ends, a rank says so, and what to change; what is none of memory stays as it is."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from made_groups import settings

from medrl.configs.errors import LearnerError
from medrl.learner.memory import advice_on_memory


def full_cpu() -> None:
    torch.empty(2**50)


def full_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nPages of it")


@pytest.mark.parametrize(
    ("fill", "detail"), [(full_cpu, "can't allocate memory"), (full_gpu, "Tried to allocate 2.00")]
)
def test_memory_that_ends_comes_with_what_to_change(fill, detail: str, tmp_path: Path) -> None:
    """Its first line is the same on every rank and at every try: by that it is known again."""
    told = []
    for rank in (0, 1):
        chosen = settings(tmp_path, tmp_path, zero_stage=2, tokens_per_micro_batch=512)
        with pytest.raises(LearnerError) as caught, advice_on_memory(chosen, rank):
            fill()
        told.append(pickle.loads(pickle.dumps(caught.value)))
    firsts, details = zip(*(str(error).split("\n") for error in told), strict=True)
    assert firsts[0] == firsts[1]
    assert "lower learner.tokens_per_micro_batch (512)" in firsts[0]
    assert "raise learner.zero_stage (2)" in firsts[0]
    assert [line.startswith(f"rank {rank}: ") for rank, line in enumerate(details)] == [True, True]
    assert detail in details[0]
    assert all(error.died and error.certain for error in told)


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    told = pytest.raises(RuntimeError, match="Connection closed by peer")
    with told, advice_on_memory(settings(tmp_path, tmp_path), 0):
        raise RuntimeError("Connection closed by peer")
