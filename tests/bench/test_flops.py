"""The count by hand is what PyTorch counts when the operations run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from medrl.bench import flops
from medrl.learner import tiny

PROMPT, TOKENS, VISUAL = 12, 7, 9
PATCHES = 4 * VISUAL


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With attention as plain matrix products, which PyTorch counts on every device."""
    from transformers import AutoModelForImageTextToText

    folder: Path = tmp_path_factory.mktemp("model")
    tiny.build("qwen2_vl", folder, corpus=["a few words"])
    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")


def run(model: Any) -> Any:
    """One completion after one prompt with one image, as its logits."""
    ids = torch.zeros(1, PROMPT + TOKENS, dtype=torch.long)
    ids[:, :VISUAL] = model.config.image_token_id
    vision = model.config.vision_config
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return model(
        input_ids=ids,
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        pixel_values=torch.randn(PATCHES, patch),
        image_grid_thw=torch.tensor([[1, 6, 6]]),
        logits_to_keep=torch.arange(PROMPT - 1, PROMPT + TOKENS - 1),
    ).logits


def masked(model: Any) -> int:
    """What plain attention computes, forward, of pairs that do not see each other."""
    total = PROMPT + TOKENS
    pairs = total * total - total * (total + 1) // 2
    return pairs * flops._pair(model.config.text_config)


def count(model: Any, way: flops.Way, completions: int) -> int:
    sizes = {"prompt": PROMPT, "tokens": TOKENS, "patches": PATCHES}
    return flops.of_pass(model.config, way, completions=completions, **sizes)


def test_a_pass_is_counted_to_the_last_operation(model: Any) -> None:
    with FlopCounterMode(display=False) as counted:
        run(model).sum().backward()
    assert counted.get_total_flops() == count(model, "usual", 1) + 3 * masked(model)


def test_the_tower_is_counted_to_the_last_operation(model: Any) -> None:
    vision = model.config.vision_config
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        pixels = torch.randn(PATCHES, flops._embedding(vision) // 2 // vision.embed_dim)
        model.model.visual(pixels, grid_thw=torch.tensor([[1, 6, 6]]))
    assert counted.get_total_flops() == flops.tower(vision, PATCHES)


def test_sharing_saves_prompts_and_padded_rows_may_share_an_image(model: Any) -> None:
    assert count(model, "usual", 8) == 8 * count(model, "usual", 1)
    assert count(model, "shared", 1) == count(model, "padded", 1) == count(model, "usual", 1)
    saved = count(model, "usual", 8) - count(model, "padded", 8)
    assert saved == 7 * (count(model, "usual", 1) - without_image(model))
    assert count(model, "shared", 8) < count(model, "padded", 8)


def without_image(model: Any) -> int:
    return flops.of_pass(
        model.config, "usual", prompt=PROMPT, completions=1, tokens=TOKENS, patches=0
    )
