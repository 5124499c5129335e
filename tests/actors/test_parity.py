"""The tokens, images and log-probs of an engine are those of transformers, family by family."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from conftest import Live
from reference import MAX_PIXELS, request

from medrl.data.images import ImageStore
from medrl.learner.model import PromptReader

pytestmark = [pytest.mark.engines, pytest.mark.asyncio(loop_scope="session")]

PROMPTS = [("0.png",), ("1.png", "2.png"), ()]


@pytest.mark.parametrize("images", PROMPTS, ids=["one image", "two images", "no image"])
async def test_prompt_ids_and_image_hashes_equal_the_processors(
    live: Live, images: tuple[str, ...]
) -> None:
    group = await live.generate(request(images))
    inputs = live.reference.inputs(group)
    assert list(group.prompt_token_ids) == inputs["input_ids"][0].tolist()
    stored = tuple(live.reference.images.load(path).sha256 for path in images)
    assert group.image_hashes == stored
    grids = inputs["image_grid_thw"] if images else []
    visual = sum(int(grid.prod()) // 4 for grid in grids)  # 2x2 patches are merged into one token
    assert group.prompt_token_ids.count(live.reference.model.config.image_token_id) == visual


async def test_a_small_image_is_the_one_a_learner_sees(live: Live) -> None:
    group = await live.generate(replace(request(("0.png",)), small=True))
    root, processor = live.reference.images.root, live.reference.processor
    store = ImageStore.for_model(root, processor.image_processor, MAX_PIXELS)
    prompt = PromptReader(str(live.folder), store).read(group)  # or refuses
    assert prompt.images == (store.small("0.png").sha256,) != (store.load("0.png").sha256,)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_logprobs_equal_a_plain_forward_pass(live: Live, temperature: float) -> None:
    asked = [
        request(images, seed=4 * number, temperature=temperature, max_tokens=12)
        for number, images in enumerate(PROMPTS)
    ]
    for group in await asyncio.gather(*map(live.generate, asked)):
        assert live.gap(group) < 1e-4
