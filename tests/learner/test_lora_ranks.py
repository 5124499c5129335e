"""Adapters on real DeepSpeed, ZeRO 0 to 3, one rank and two, against one plain process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_jobs import GOING_ON, RANK, attach_trained, lora_jobs
from made_groups import PlainStepper, gradient_gap, mixed_batch, settings
from rank_jobs import STAGES, run_ranks
from test_shared_rows import ordinary, plain_logprobs

from medrl.actors.types import UpdateMetrics
from medrl.configs.schema import ModelConfig
from medrl.learner.model import PromptReader, load_policy
from medrl.learner.update import Updater
from medrl.learner.weight_source import ModuleSource

pytestmark = [pytest.mark.engines, pytest.mark.timeout(400)]
MODEL = "qwen2_vl"


@pytest.fixture(scope="module")
def results(
    tiny_models: dict[str, Path], image_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, Any]]:
    """By number of ranks, by job."""
    found = {}
    for world in (1, 2):
        out = tmp_path_factory.mktemp(f"adapters{world}")
        wait = run_ranks(world, tiny_models[MODEL], image_root, out, timeout_s=180, jobs=lora_jobs)
        found[world] = wait() | {"out": out}
    return found


Plain = Callable[[int, bool], tuple[UpdateMetrics, dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def plain(
    tiny_models: dict[str, Path], readers: dict[str, PromptReader], image_root: Path
) -> Plain:
    """One process of plain PyTorch over so many groups; the reference is a model of its own."""
    reader, path = readers[MODEL], tiny_models[MODEL]

    @cache
    def run(groups: int, vision: bool) -> tuple[UpdateMetrics, dict[str, torch.Tensor]]:
        policy, start = (
            load_policy(str(path), torch.float32, forbidden=reader.forbidden) for _ in range(2)
        )
        config = ModelConfig(path=str(path), lora_rank=RANK, lora_vision=vision)
        attach_trained(policy.vlm, config, 0)
        stepper = PlainStepper(policy, reader, reference=start)
        chosen = settings(path, image_root, kl_coefficient=0.1)
        metrics = Updater(stepper, reader, chosen).update(mixed_batch(reader)[:groups], version=0)
        return metrics, stepper.gradients()

    return run


JOBS = [(world, f"zero {stage}") for world in (1, 2) for stage in STAGES]
JOBS += [(2, job) for job in ("tower", "checkpointed", "checkpointed tower", "one group")]


@pytest.mark.parametrize(("world", "job"), JOBS)
def test_loss_kl_and_gradients_are_those_of_one_plain_process(
    world: int, job: str, results: dict[int, dict[str, Any]], plain: Plain
) -> None:
    want, gradients = plain(1 if job == "one group" else 7, "tower" in job)
    got: UpdateMetrics = results[world][job]["metrics"]
    assert want.kl > 1e-4  # else the reference need not be another model
    assert gradient_gap(results[world][job]["gradients"], gradients) < 1e-5
    for field in ("loss", "kl", "entropy", "gradient_norm", "logprob_gap_mean"):
        assert getattr(got, field) == pytest.approx(getattr(want, field), rel=1e-5, abs=1e-6), field


@pytest.mark.parametrize("stage", [0, 3])
def test_the_reference_is_the_starting_model_and_no_second_one_is_loaded(
    stage: int,
    results: dict[int, dict[str, Any]],
    tiny_models: dict[str, Path],
    readers: dict[str, PromptReader],
    image_root: Path,
) -> None:
    found, reader = results[2][f"reference {stage}"], readers[MODEL]
    assert found["loaded"] == 1
    start = load_policy(str(tiny_models[MODEL]), torch.float32, forbidden=reader.forbidden)
    chosen = settings(tiny_models[MODEL], image_root)
    updater = Updater(PlainStepper(start, reader), reader, chosen)
    for scored, reference, policy in zip(
        mixed_batch(reader), found["reference"], found["policy"], strict=True
    ):
        want = torch.tensor(sum(updater.logprobs(scored.group), ()))
        torch.testing.assert_close(torch.tensor(sum(reference, ())), want, atol=1e-6, rtol=0)
        assert (torch.tensor(sum(policy, ())) - want).abs().max() > 1e-3


@pytest.mark.parametrize("job", ["steps", "steps tower", "steps bfloat16"])
def test_steps_change_adapters_only_and_others_see_merged_weights(
    job: str, results: dict[int, dict[str, Any]]
) -> None:
    """What is frozen stays byte for byte."""
    found = results[2][job]
    assert found["changed"] == {name for name in found["names"] if ".lora_" in name}
    adapted = {n.partition(".lora_")[0] + ".weight" for n in found["changed"]}
    assert found["merged changed"] == adapted
    assert any("visual" in name for name in adapted) == (job == "steps tower")
    assert found["dtypes"] == {"torch.bfloat16" if "bfloat16" in job else "torch.float32"}


def test_bfloat16_has_the_scale_of_float32(
    results: dict[int, dict[str, Any]], plain: Plain
) -> None:
    exact, _ = plain(7, False)
    rough: UpdateMetrics = results[2]["bfloat16"]["metrics"]
    assert rough.gradient_norm == pytest.approx(exact.gradient_norm, rel=0.05)
    assert rough.loss == pytest.approx(exact.loss, abs=0.02)


@pytest.mark.parametrize(("stage", "dtype"), GOING_ON)
def test_going_on_from_a_checkpoint_equals_not_stopping(
    stage: int, dtype: str, results: dict[int, dict[str, Any]]
) -> None:
    found = results[2][f"going on {stage} {dtype}"]
    for name, want in found["uninterrupted"].items():
        torch.testing.assert_close(found["resumed"][name], want, atol=1e-6, rtol=0, msg=name)
    for want, got in found["losses"]:
        assert got == pytest.approx(want, abs=1e-6)


def test_a_checkpoint_of_other_adapters_is_refused(results: dict[int, dict[str, Any]]) -> None:
    error = results[2]["other rank"]
    assert f"it has lora_rank = {RANK}, this run {RANK + 1}" in error
    assert "it has lora_vision = False, this run True" in error


def test_export_and_adapter_of_two_ranks_load_and_give_the_learners_logprobs(
    results: dict[int, dict[str, Any]],
    tiny_models: dict[str, Path],
    readers: dict[str, PromptReader],
) -> None:
    from peft import PeftModel

    folder, reader = results[2]["out"] / "export", readers[MODEL]
    start, merged = ordinary(tiny_models[MODEL]), ordinary(folder)
    assert results[2]["exported"]["weights"] == ModuleSource(start).metadata()
    adapted = PeftModel.from_pretrained(start, folder / "adapter")
    batch = mixed_batch(reader)
    for scored, of_group in zip(batch, results[2]["exported"]["logprobs"], strict=True):
        for vlm in (merged, adapted):
            for got, want in zip(plain_logprobs(vlm, scored, reader), of_group, strict=True):
                torch.testing.assert_close(got.detach(), torch.tensor(want), atol=1e-5, rtol=0)
