"""Ranks of real DeepSpeed whose frozen tower remembers images: none waits for another for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_groups import gradient_gap
from rank_jobs import run_ranks
from vision_jobs import vision_jobs

pytestmark = [pytest.mark.engines, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def results(
    tiny_models: dict[str, Path], image_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("vision")
    found: dict[str, Any] = run_ranks(
        2, tiny_models["qwen3_vl"], image_root, out, 180, vision_jobs
    )()
    return found


@pytest.mark.parametrize("kind", ["zero 2", "zero 3", "adapters"])
def test_ranks_that_remember_different_images_train_as_those_that_remember_none(
    kind: str, results: dict[str, Any]
) -> None:
    """Under ZeRO-3 a tower that one rank runs and the other does not would hang both."""
    kept, without = (results[f"{kind}, {gib} GiB"] for gib in (1, 0))
    for (loss, gradients, _), (want, expected, _) in zip(
        kept["updates"], without["updates"], strict=True
    ):
        assert loss == pytest.approx(want, abs=1e-6)
        assert gradient_gap(gradients, expected) < 1e-5
    for mine, theirs in zip(kept["logprobs"], without["logprobs"], strict=True):
        for got, want in zip(mine, theirs, strict=True):
            assert got == pytest.approx(want, abs=1e-5)
    assert all(runs > 0 for *_, runs in without["updates"][3:])
    assert sum(runs for *_, runs in kept["updates"]) < sum(r for *_, r in without["updates"])
