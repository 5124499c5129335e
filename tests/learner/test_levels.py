"""Kept in a byte a pixel and channel, an image is given back as the processor made it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor

from medrl.learner.levels import ImageProcessor

CPU = torch.device("cpu")
HALF = [0.5, 0.5, 0.5]
KINDS: dict[str, dict[str, Any]] = {
    "Qwen2-VL, Qwen2.5-VL": {},
    "Qwen3-VL": {"patch_size": 16, "image_mean": HALF, "image_std": HALF},
    "one frame, no merging": {"temporal_patch_size": 1, "merge_size": 1},
    "not normalised": {"do_normalize": False},
    "levels as they are": {"do_normalize": False, "do_rescale": False},
}


def picture(width: int, height: int, most: int = 256) -> Image.Image:
    """Noise; every level below `most` is in it."""
    return Image.fromarray(
        np.random.default_rng(width).integers(0, most, (height, width, 3), dtype=np.uint8)
    )


def made_by(processor: Any, image: Image.Image) -> torch.Tensor:
    pixels: torch.Tensor = processor(images=[image], return_tensors="pt")["pixel_values"]
    return pixels


@pytest.mark.parametrize("kind", KINDS)
def test_patches_are_those_of_the_processor_to_the_last_bit(kind: str) -> None:
    own = Qwen2VLImageProcessor(**KINDS[kind])
    process, side = ImageProcessor(own), own.patch_size * own.merge_size
    for image in (picture(8 * side, 14 * side), picture(14 * side, 4 * side, 20), picture(5, 9)):
        got, want = process(image), made_by(own, image)
        pixels = got.pixels.to(CPU)
        assert pixels.dtype == want.dtype
        assert torch.equal(pixels, want)
        assert len(want) == int(got.grid.prod()) == got.tokens * own.merge_size**2


def test_a_byte_is_kept_for_each_pixel_and_channel() -> None:
    got = ImageProcessor(Qwen2VLImageProcessor())(picture(392, 280))
    assert got.pixels.nbytes == 392 * 280 * 3
    assert got.pixels.to(CPU).nbytes == 392 * 280 * 3 * 4 * 2  # float32, two frames


class OfTheWholeImage(Qwen2VLImageProcessor):
    """What a level becomes depends on the others: no table has it."""

    def rescale_and_normalize(self, images: Any, do_rescale: bool, *how: Any) -> Any:
        return images - images.float().mean() if do_rescale else images


class Fading(Qwen2VLImageProcessor):
    """The second frame is darker than the first."""

    def patchify(self, images: Any, *how: Any, **named: Any) -> Any:
        patches, height, width = super().patchify(images, *how, **named)
        frames = patches.unflatten(-1, (3, 2, -1)).clone()
        frames[..., 1, :] //= 2
        return frames.flatten(-3), height, width


class Deaf(Qwen2VLImageProcessor):
    """Does its arithmetic whether it is asked to or not."""

    def rescale_and_normalize(self, images: Any, *how: Any) -> Any:
        return images / 255


@pytest.mark.parametrize("kind", [OfTheWholeImage, Fading, Deaf])
def test_what_another_processor_makes_is_kept_as_it_is(kind: Any) -> None:
    own = kind()
    for image in (picture(112, 84), picture(84, 84, 20)):
        got, want = ImageProcessor(own)(image), made_by(own, image)
        assert torch.equal(got.pixels.to(CPU), want)
        assert got.pixels.nbytes == want.nbytes
