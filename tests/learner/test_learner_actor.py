"""The learner on a real local Ray: it learns, refuses what it must, names the rank that died."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from made_groups import examples, mixed_batch, settings

from medrl.configs.errors import CheckpointError, LearnerError, UserError
from medrl.learner.actor import RayLearner, create_learner, refuse_unshared
from medrl.learner.model import PromptReader

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    os.environ["RAY_DISABLE_USAGE_STATS"] = "1"
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


async def two_ranks(model: Path, images: Path) -> RayLearner:
    return await create_learner(
        settings(model, images, zero_stage=3, tokens_per_micro_batch=100),
        world=2,
        options_for_rank=lambda rank: {"num_cpus": 1},
        timeout_s=120,
        heartbeat_s=60,
    )


async def test_a_learner_of_two_ranks(
    local_ray: None,
    tiny_models: dict[str, Path],
    readers: dict[str, PromptReader],
    image_root: Path,
    tmp_path: Path,
) -> None:
    reader, model = readers["qwen2_vl"], tiny_models["qwen2_vl"]
    batch = mixed_batch(reader)
    learner = await two_ranks(model, image_root)
    try:
        before = await learner.logprobs(batch[0].group)
        metrics = await learner.update(batch)
        assert metrics.gradient_norm > 0
        assert await learner.logprobs(batch[0].group) != before
        assert any(meta.name.startswith("model.visual") for meta in await learner.weights())

        first, second = [await learner.imitate(examples()) for _ in range(2)]
        assert second.loss < first.loss
        special = replace(examples()[0], target="<|im_end|>")
        with pytest.raises(LearnerError, match="prompt e0: the answer to imitate holds special"):
            await learner.imitate([special])

        folder = tmp_path / "checkpoint"
        folder.mkdir()
        await learner.save(folder)
        saved = await learner.logprobs(batch[0].group)
        assert (folder / "model" / "config.json").exists()

        ids = (*batch[1].group.prompt_token_ids[:-1], 5)
        wrong = replace(batch[1], group=replace(batch[1].group, prompt_token_ids=ids))
        with pytest.raises(LearnerError, match="prompt p1: token ids") as refusal:
            await learner.update([batch[0], wrong])
        assert not refusal.value.died
        await learner.update(batch)

        pid = await learner._ranks[1].__ray_call__.remote(lambda rank: os.getpid())
        dying = asyncio.create_task(learner.update(batch * 20))
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(LearnerError, match=r"learner rank 1 died \(update\)") as death:
            await dying
        assert "\n" not in str(death.value)  # Ray would fill a page
        assert death.value.died

        await learner.restart()
        assert await learner.logprobs(batch[0].group) == before
        await learner.load(folder)
        assert await learner.logprobs(batch[0].group) == saved
    finally:
        await learner.close()
        await learner.close()
    with pytest.raises(LearnerError, match="closed"):
        await learner.update(batch)


async def test_a_rank_that_hangs_is_dead_and_one_that_works_long_is_not(
    local_ray: None,
    tiny_models: dict[str, Path],
    readers: dict[str, PromptReader],
    image_root: Path,
) -> None:
    """With one rank there is no collective whose deadline would tell."""
    batch = mixed_batch(readers["qwen2_vl"])
    learner = await create_learner(
        settings(tiny_models["qwen2_vl"], image_root),
        world=1,
        options_for_rank=lambda rank: {"num_cpus": 2},  # all there are: a second finds no room
        timeout_s=120,
        heartbeat_s=8,
    )
    try:
        before = await learner.logprobs(batch[0].group)
        work = "import time, torch; x = torch.ones(400, 400); end = time.time() + 12\n"
        work += "while time.time() < end: x = (x @ x).clamp(max=1)"
        await learner.each("work", lambda rank: rank.__ray_call__.remote(lambda self: exec(work)))

        pid = await learner._ranks[0].__ray_call__.remote(lambda rank: os.getpid())
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(LearnerError, match=r"rank 0 \(update\) hangs: .* within 8 s") as death:
            await learner.update(batch)
        assert death.value.died
        await learner.restart()
        assert await learner.logprobs(batch[0].group) == before
    finally:
        await learner.close()


async def test_a_model_that_cannot_be_trained_is_the_users_mistake(
    local_ray: None, image_root: Path, tmp_path: Path
) -> None:
    import transformers

    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"bert model, needs one of qwen2_vl"):
        await two_ranks(tmp_path, image_root)


async def test_without_room_for_all_ranks_none_starts_and_it_is_no_death(
    local_ray: None, tiny_models: dict[str, Path], image_root: Path
) -> None:
    """The run stops then: to try again would only wait again."""
    with pytest.raises(
        LearnerError, match=r"no room for 1 of 2 learner rank.* within 10 s"
    ) as told:
        await create_learner(
            settings(tiny_models["qwen2_vl"], image_root),
            world=2,
            options_for_rank=lambda rank: {"num_cpus": 2},  # all there are
            timeout_s=10,
            heartbeat_s=8,
        )
    assert not told.value.died
    async with asyncio.timeout(30):
        while ray.available_resources().get("CPU") != 2:  # the one that had room is ended
            await asyncio.sleep(0.1)


def test_files_on_a_ranks_own_disk_are_no_checkpoint(tmp_path: Path) -> None:
    """What the driver's node does not have cannot be sealed, and would be missed on a resume."""
    (tmp_path / "model").mkdir()
    for name in ("model/weights", "rng_0.pt"):
        (tmp_path / name).touch()
    refuse_unshared(tmp_path, [["rng_0.pt", "model/weights"], []])
    with pytest.raises(CheckpointError, match=r"rank 1 wrote rng_1.pt .*all nodes share"):
        refuse_unshared(tmp_path, [["rng_0.pt"], ["rng_0.pt", "rng_1.pt"]])
