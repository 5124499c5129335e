"""Supervised steps on real DeepSpeed, ZeRO 0 to 3, one rank and two, against one plain process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from imitation_jobs import imitation_jobs
from made_groups import PlainStepper, examples, gradient_gap, settings
from rank_jobs import STAGES, run_ranks

from medrl.learner.imitate import Imitator
from medrl.learner.model import PromptReader, load_policy

pytestmark = [pytest.mark.engines, pytest.mark.timeout(400)]
MODEL = "qwen2_vl"


@pytest.fixture(scope="module")
def results(
    tiny_models: dict[str, Path], image_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, Any]]:
    """By number of ranks, by job."""
    found = {}
    for world in (1, 2):
        out = tmp_path_factory.mktemp(f"imitation{world}")
        model = tiny_models[MODEL]
        found[world] = run_ranks(world, model, image_root, out, 180, imitation_jobs)()
    return found


IMITATIONS = [(world, f"zero {stage}") for world in (1, 2) for stage in STAGES]


@pytest.mark.parametrize(("world", "job"), [*IMITATIONS, (2, "one")])
def test_a_supervised_step_is_that_of_one_plain_process(
    world: int,
    job: str,
    results: dict[int, dict[str, Any]],
    tiny_models: dict[str, Path],
    readers: dict[str, PromptReader],
    image_root: Path,
) -> None:
    """With one example the second rank only keeps the first company."""
    reader, path = readers["qwen2_vl"], tiny_models["qwen2_vl"]
    policy = load_policy(str(path), torch.float32, forbidden=reader.forbidden)
    stepper = PlainStepper(policy, reader)
    batch = examples()[1:2] if job == "one" else examples()
    want = Imitator(stepper, reader, settings(path, image_root)).imitate(batch, version=0)
    got = results[world][job]["metrics"]
    assert gradient_gap(results[world][job]["gradients"], stepper.gradients()) < 1e-5
    assert got.loss == pytest.approx(want.loss, abs=1e-5)
    assert got.gradient_norm == pytest.approx(want.gradient_norm, rel=1e-5)
    assert (got.tokens, got.learning_rate) == (want.tokens, want.learning_rate)


def test_a_supervised_step_one_rank_refuses_is_refused_by_all_and_leaves_no_trace(
    results: dict[int, dict[str, Any]],
) -> None:
    found = results[2]["refused"]
    missing, poisoned = found["errors"]
    assert "gone.png" in missing
    assert "step 1: the gradient's norm is" in poisoned
    assert "sft.learning_rate" in poisoned
    assert found["kept"]
    assert found["metrics"].loss == pytest.approx(results[2]["zero 3"]["metrics"].loss, abs=1e-5)
    assert found["metrics"].gradient_norm == pytest.approx(
        results[2]["zero 3"]["metrics"].gradient_norm, rel=1e-5
    )


@pytest.mark.parametrize("world", [1, 2])
def test_bfloat16_has_the_scale_of_float32(world: int, results: dict[int, dict[str, Any]]) -> None:
    exact, rough = (results[world][job]["metrics"] for job in ("zero 3", "bfloat16"))
    assert rough.loss == pytest.approx(exact.loss, rel=0.01)
    assert rough.gradient_norm == pytest.approx(exact.gradient_norm, rel=0.05)
