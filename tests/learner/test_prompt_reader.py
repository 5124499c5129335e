"""The tokens and images that are trained are those that were sampled, or the prompt is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_groups import image_store, scored_group

from medrl.actors.chat import render_chat
from medrl.configs.errors import LearnerError, UserError
from medrl.learner import tiny
from medrl.learner.model import PromptReader, read_config

CPU = torch.device("cpu")
IMAGES: list[tuple[str, ...]] = [(), ("a.png",), ("b.png", "c.png")]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("names", IMAGES, ids=len)
def test_inputs_are_those_of_the_processor(
    family: str, names: tuple[str, ...], readers: dict[str, PromptReader]
) -> None:
    reader = readers[family]
    group = scored_group(reader, names, seed=0, rewards=[0.0, 1.0]).group
    images = [reader.images.source.load(path).image for path in names]
    chat = render_chat(reader.processor, group.request.text, len(names))
    want = reader.processor(text=[chat], images=images or None, return_tensors="pt")
    got = reader.read(group)
    assert got.token_ids.tolist() == want["input_ids"][0].tolist()
    assert int(got.positions.max()) + 1 == got.next_position
    if names:
        pixels = torch.cat([reader.image(hash).pixels.to(CPU) for hash in got.images])
        assert torch.equal(pixels, want["pixel_values"])
        grid = torch.stack([reader.image(hash).grid for hash in got.images])
        assert grid.tolist() == want["image_grid_thw"].tolist()


def test_an_image_is_decoded_and_processed_once(
    tiny_models: dict[str, Path], image_root: Path
) -> None:
    path = str(tiny_models["qwen2_vl"])
    store = image_store(path, image_root)
    reader = PromptReader(path, store)
    group = scored_group(reader, ("a.png",), seed=0, rewards=[0.0, 1.0]).group
    decoded = store.decoded
    for _ in range(3):
        prompt = reader.read(group)
        reader.image(prompt.images[0])
    assert store.decoded == decoded + 1


def test_a_small_image_is_another_than_the_whole_one(
    tiny_models: dict[str, Path], image_root: Path
) -> None:
    path = str(tiny_models["qwen2_vl"])
    store = image_store(path, image_root)
    reader = PromptReader(path, store)
    whole = scored_group(reader, ("a.png",), seed=0, rewards=[0.0, 1.0]).group.request
    prompts = [reader.inputs(one) for one in (whole, replace(whole, small=True), whole)]
    assert [one.images for one in prompts] == [
        (look("a.png").sha256,) for look in (store.load, store.small, store.load)
    ]
    tokens = [reader.image(one.images[0]).tokens for one in prompts]
    assert tokens[0] == tokens[2] > tokens[1]
    assert len(prompts[0].token_ids) - len(prompts[1].token_ids) == tokens[0] - tokens[1]


def test_a_full_cache_drops_the_oldest_and_makes_it_again(
    tiny_models: dict[str, Path], image_root: Path
) -> None:
    path = str(tiny_models["qwen2_vl"])
    store = image_store(path, image_root)
    reader = PromptReader(path, store, cache_bytes=1)
    made = [
        scored_group(reader, (name,), seed=i, rewards=[0.0, 1.0]).group
        for i, name in enumerate(("a.png", "b.png"))
    ]
    prompts = [reader.read(group) for group in made]
    first = reader.image(prompts[0].images[0])
    assert first.tokens == prompts[0].token_ids.tolist().count(reader.config.image_token_id)


def test_an_image_that_changed_after_it_left_the_cache_is_refused(
    tiny_models: dict[str, Path], image_root: Path, tmp_path: Path
) -> None:
    shutil.copytree(image_root, tmp_path / "images")
    path = str(tiny_models["qwen2_vl"])
    reader = PromptReader(path, image_store(path, tmp_path / "images"), cache_bytes=1)
    names = ("a.png", "b.png")
    group = scored_group(reader, names, seed=7, rewards=[0.0, 1.0]).group
    first, _ = reader.read(group).images
    shutil.copy(image_root / "c.png", tmp_path / "images" / "a.png")
    with pytest.raises(LearnerError, match=r"image a\.png changed while the run was using it"):
        reader.image(first)


def test_the_order_of_a_prompts_images_is_part_of_it(readers: dict[str, PromptReader]) -> None:
    reader = readers["qwen2_vl"]
    group = scored_group(reader, ("a.png", "d.png"), seed=7, rewards=[0.0, 1.0]).group
    with pytest.raises(LearnerError, match="prompt p7: the images"):
        reader.read(replace(group, image_hashes=group.image_hashes[::-1]))


def test_a_swapped_image_is_refused(
    tiny_models: dict[str, Path], image_root: Path, tmp_path: Path
) -> None:
    shutil.copytree(image_root, tmp_path / "images")
    path = str(tiny_models["qwen2_vl"])
    store = image_store(path, tmp_path / "images")
    group = scored_group(PromptReader(path, store), ("a.png",), seed=7, rewards=[0.0, 1.0]).group
    shutil.copy(image_root / "b.png", tmp_path / "images" / "a.png")
    with pytest.raises(LearnerError, match=r"prompt p7: the images \['a.png'\]"):
        PromptReader(path, store).read(group)


def test_other_tokens_are_refused(readers: dict[str, PromptReader]) -> None:
    reader = readers["qwen2_vl"]
    group = scored_group(reader, ("a.png",), seed=7, rewards=[0.0, 1.0]).group
    ids = group.prompt_token_ids
    image = reader.config.image_token_id
    fewer_visual = tuple(t for i, t in enumerate(ids) if t != image or ids[i - 1] == image)
    for wrong in (ids[:-1], (*ids[:-1], 5), fewer_visual):
        with pytest.raises(LearnerError, match="prompt p7: token ids"):
            reader.read(replace(group, prompt_token_ids=wrong))
    reader.read(group)


def test_a_model_that_rows_do_not_fit_is_refused(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((tiny_models["qwen2_vl"] / "config.json").read_text())
    config["text_config"]["layer_types"] = ["full_attention", "sliding_attention"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="sliding-window"):
        read_config(str(tmp_path))
    with pytest.raises(UserError, match="cannot be loaded"):
        read_config(str(tmp_path / "absent"))
