"""Two images swapped between a real engine and the learner are refused, wherever it happens."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Live
from reference import MAX_PIXELS, request

from medrl.actors.types import Group
from medrl.configs.errors import LearnerError
from medrl.data.images import ImageStore
from medrl.learner.model import PromptReader

pytestmark = [
    pytest.mark.engines,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.parametrize("started", ["qwen2_vl"], indirect=True),
]


def reader_of(live: Live, images: Path) -> PromptReader:
    """As a learner rank makes it, with nothing decoded yet."""
    store = ImageStore.for_model(images, live.reference.processor.image_processor, MAX_PIXELS)
    return PromptReader(str(live.folder), store)


async def sampled(live: Live) -> tuple[Group, Group]:
    first, second = await asyncio.gather(
        *(live.generate(request((name,), n=2)) for name in ("0.png", "1.png"))
    )
    return first, second


async def test_files_swapped_on_disk_after_sampling(live: Live, tmp_path: Path) -> None:
    groups = await sampled(live)
    images = live.reference.images.root
    for group in groups:
        reader_of(live, images).read(group)  # as they were, they are taken
    for here, there in (("0.png", "1.png"), ("1.png", "0.png")):
        shutil.copy(images / here, tmp_path / there)
    for group, name in zip(groups, ("0", "1"), strict=True):
        with pytest.raises(LearnerError, match=rf"the images \['{name}\.png'\] here are not those"):
            reader_of(live, tmp_path).read(group)


async def test_groups_with_each_others_images(live: Live) -> None:
    first, second = await sampled(live)
    # Same text, same size: only the hash tells that these tokens were not sampled from this image.
    assert first.prompt_token_ids == second.prompt_token_ids
    swapped = replace(first, image_hashes=second.image_hashes)
    with pytest.raises(LearnerError, match=r"the images \['0\.png'\] here are not those"):
        reader_of(live, live.reference.images.root).read(swapped)
