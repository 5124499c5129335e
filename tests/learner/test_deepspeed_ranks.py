"""Real DeepSpeed, ZeRO 0 to 3, one rank and two: the same loss, the same gradients, no hang.

The yardstick is one process of plain PyTorch over the whole batch. The batch has prompts with two,
one and no images, a failed completion and a group of equal rewards (`mixed_batch`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from made_groups import PlainStepper, gradient_gap, image_store, mixed_batch, settings
from rank_jobs import BUDGET, GOING_ON, STAGES, run_ranks

from medrl.actors.types import UpdateMetrics
from medrl.learner import update
from medrl.learner.model import PromptReader, load_policy
from medrl.learner.rows import plan_rows
from medrl.learner.update import Updater

pytestmark = [pytest.mark.engines, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def results(
    tiny_models: dict[str, Path], image_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, Any]]:
    """By number of ranks, by job."""
    found = {}
    for world in (1, 2):
        out = tmp_path_factory.mktemp(f"world{world}")
        wait = run_ranks(world, tiny_models["qwen2_vl"], image_root, out, timeout_s=180)
        found[world] = wait() | {"out": out}
    return found


Plain = Callable[[int], tuple[UpdateMetrics, dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def plain(
    tiny_models: dict[str, Path], readers: dict[str, PromptReader], image_root: Path
) -> Plain:
    """The first so many groups in one micro-batch of one process of plain PyTorch."""
    reader, path = readers["qwen2_vl"], tiny_models["qwen2_vl"]

    @cache
    def run(groups: int) -> tuple[UpdateMetrics, dict[str, torch.Tensor]]:
        policy, start = (
            load_policy(str(path), torch.float32, forbidden=reader.forbidden) for _ in range(2)
        )
        stepper = PlainStepper(policy, reader, reference=start)
        chosen = settings(path, image_root, kl_coefficient=0.1)
        batch = mixed_batch(reader)[:groups]
        metrics = Updater(stepper, reader, chosen).update(batch, version=0)
        return metrics, stepper.gradients()

    return run


JOBS = [(w, f"zero {stage}") for w in (1, 2) for stage in STAGES]
JOBS += [(1, "checkpointed"), (2, "checkpointed"), (2, "one group")]


@pytest.mark.parametrize(("world", "job"), JOBS)
def test_loss_and_gradients_are_those_of_one_plain_process(
    world: int, job: str, results: dict[int, dict[str, Any]], plain: Plain
) -> None:
    want, gradients = plain(1 if job == "one group" else 7)
    got: UpdateMetrics = results[world][job]["metrics"]
    assert gradient_gap(results[world][job]["gradients"], gradients) < 1e-5
    for field in ("loss", "entropy", "gradient_norm", "logprob_gap_mean", "logprob_gap_max"):
        assert getattr(got, field) == pytest.approx(getattr(want, field), rel=1e-5, abs=1e-6), field
    for field in ("trained_completions", "completion_tokens", "visual_tokens", "advantages"):
        assert getattr(got, field) == getattr(want, field), field


def test_these_batches_put_text_beside_images_and_leave_a_rank_idle(
    readers: dict[str, PromptReader],
) -> None:
    """The cases in which ranks of ZeRO-3 would wait for each other for ever."""
    sizes = [
        update._size(scored, mask_truncated=False) for scored in mixed_batch(readers["qwen2_vl"])
    ]
    seven = [one for mine in plan_rows(sizes, world=2, budget=BUDGET).ranks for one in mine]
    text_only = [
        one for one in seven if one.rows and not any(sizes[r.group].images for r in one.rows)
    ]
    assert any(one.vision for one in text_only)
    assert not all(one.vision for one in text_only)
    assert any(not one.rows for one in seven)
    (idle,) = plan_rows(sizes[:1], world=2, budget=BUDGET).ranks[1]
    assert idle.vision
    assert not idle.rows


def test_several_updates_a_batch_do_not_depend_on_the_number_of_ranks(
    results: dict[int, dict[str, Any]],
) -> None:
    one, two = (results[world]["two updates"]["metrics"] for world in (1, 2))
    assert one.clip_fraction > 0
    assert two.loss == pytest.approx(one.loss, rel=1e-3)
    assert two.clip_fraction == pytest.approx(one.clip_fraction, abs=0.02)


def test_a_frozen_tower_stays_as_it_is(results: dict[int, dict[str, Any]]) -> None:
    changed = results[2]["frozen tower"]["changed"]
    assert changed
    assert not any(name.startswith("model.visual") for name in changed)


@pytest.mark.parametrize(("stage", "dtype"), GOING_ON)
def test_going_on_from_a_checkpoint_equals_not_stopping(
    stage: int, dtype: str, results: dict[int, dict[str, Any]]
) -> None:
    """Two steps, a checkpoint and one more are three: AdamW's state is all there."""
    found = results[2][f"going on {stage} {dtype}"]
    for name, want in found["uninterrupted"].items():
        torch.testing.assert_close(found["resumed"][name], want, atol=1e-6, rtol=0, msg=name)
    for want, got in found["losses"]:
        assert got == pytest.approx(want, abs=1e-6)
    assert all(want == got for want, got in found["rates"])


@pytest.mark.parametrize(("stage", "dtype"), GOING_ON)
def test_weights_lie_where_engines_can_read_them(
    stage: int, dtype: str, results: dict[int, dict[str, Any]]
) -> None:
    """Through updates, a checkpoint and its loading; at stage 3 since they were last gathered."""
    found = results[2][f"going on {stage} {dtype}"]
    assert found["lying"].keys() == found["resumed"].keys()
    for name, want in found["resumed"].items():
        assert torch.equal(found["lying"][name], want), name


def test_frozen_weights_lie_beside_those_that_deepspeed_has_in_one_piece(
    results: dict[int, dict[str, Any]],
) -> None:
    assert results[2]["frozen tower, lying"]


def test_a_checkpoint_of_another_stage_is_refused(results: dict[int, dict[str, Any]]) -> None:
    assert "zero_stage = 2, this run 3" in results[2]["other run"]


def test_an_export_loads_in_transformers_and_gives_the_same_logprobs(
    results: dict[int, dict[str, Any]], image_root: Path
) -> None:
    folder = str(results[2]["out"] / "export")
    reader = PromptReader(folder, image_store(folder, image_root))
    policy = load_policy(folder, torch.float32, forbidden=reader.forbidden)
    updater = Updater(PlainStepper(policy, reader), reader, settings(Path(folder), image_root))
    for scored, want in zip(mixed_batch(reader), results[2]["exported"]["logprobs"], strict=True):
        for mine, theirs in zip(updater.logprobs(scored.group), want, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)
    names = {meta.name: meta.shape for meta in results[2]["exported"]["weights"]}
    assert names == {name: tuple(p.shape) for name, p in policy.vlm.named_parameters()}


@pytest.mark.parametrize("world", [1, 2])
def test_rank_0_gets_the_parameters_that_deepspeed_gathers(
    world: int, results: dict[int, dict[str, Any]]
) -> None:
    found = results[world]["gathered"]
    for ours in found["ours"]:
        assert ours.keys() == found["deepspeed's"].keys()
        for name, tensor in found["deepspeed's"].items():
            assert torch.equal(ours[name], tensor), name
    assert found["in common"]
    assert found["as before"]


@pytest.mark.parametrize("world", [1, 2])
def test_rank_0_gets_whole_what_other_ranks_write_ahead_of_it(
    world: int, results: dict[int, dict[str, Any]]
) -> None:
    together, apart = results[world]["odd parts"], results[world]["odd parts apart"]
    assert (together["in common"], apart["in common"]) == (True, False)
    assert len(together["same"]) == len(apart["same"]) == 24
    assert all(together["same"])
    assert all(apart["same"])


def test_a_batch_of_truncated_completions_alone_changes_nothing_and_the_ranks_go_on(
    results: dict[int, dict[str, Any]],
) -> None:
    found = results[2]["all truncated"]
    assert (found["nothing"].trained_completions, found["nothing"].gradient_norm) == (0, 0)
    assert found["kept"]
    assert found["next"].gradient_norm > 0


def test_a_prompt_one_rank_refuses_is_refused_by_all_and_the_ranks_go_on(
    results: dict[int, dict[str, Any]],
) -> None:
    found = results[2]["refusal"]
    assert found["error"].startswith("prompt p0: the images ['a.png'] here are not those")
    assert abs(found["loss_after"]) < 1  # an update like any other


def test_an_image_that_changes_in_the_midst_of_a_batch_is_refused_by_all_ranks(
    results: dict[int, dict[str, Any]],
) -> None:
    assert results[2]["changed image"] == "image a.png changed while the run was using it"


POISONED = [f"{stage} float32" for stage in STAGES] + [f"{stage} bfloat16" for stage in (1, 2, 3)]


@pytest.mark.parametrize("case", POISONED)
def test_one_ranks_gradient_that_is_no_number_stops_all_and_leaves_the_weights(
    case: str, results: dict[int, dict[str, Any]]
) -> None:
    found = results[2][f"poisoned {case}"]
    assert "step 2: the gradient's norm is" in found["error"]
    assert found["kept"]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_has_the_scale_of_float32(
    world: int, stage: int, results: dict[int, dict[str, Any]]
) -> None:
    """Averaging over ranks and adding up micro-batches go other ways in DeepSpeed there."""
    exact: UpdateMetrics = results[1]["zero 0"]["metrics"]
    rough: UpdateMetrics = results[world][f"bfloat16 {stage}"]["metrics"]
    assert rough.gradient_norm == pytest.approx(exact.gradient_norm, rel=0.05)
    assert rough.loss == pytest.approx(exact.loss, abs=0.02)


def test_bfloat16_keeps_float32_weights_behind(results: dict[int, dict[str, Any]]) -> None:
    """Stage 0 would not: it runs as stage 1."""
    found = results[2]["bfloat16"]
    assert all(tensor.dtype == torch.bfloat16 for tensor in found["after"].values())
    assert any(not found["before"][n].equal(found["after"][n]) for n in found["before"])
    assert found["metrics"].gradient_norm > 0
