"""What the model's image processor makes of an image, kept in a byte a pixel and channel.

The processor cuts an image into patches, repeats each for the frames that a tower wants, and turns
each of a channel's 256 levels into a number: eight bytes of what was one. Here it only cuts, and
the numbers are looked up when they are needed, on the device that needs them. They are to the last
bit the processor's, for the table was made by it. A processor that does more than a table does what
it does, and all of that is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from medrl.learner.vision import ImageInputs

_CHANNELS, _LEVELS = 3, 256
_TRIAL_SIDE = 16  # visual tokens; at 28 pixels each a level is met 784 times in a channel


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """The patches of a still image, and what its levels stand for."""

    levels: Tensor  # [N, channels, pixels of a patch] uint8
    values: Tensor  # [channels, 256], of all images
    frames: int  # of a patch; they are equal

    @property
    def nbytes(self) -> int:
        return self.levels.nbytes

    def to(self, device: torch.device) -> Tensor:
        """[N, patch] as the processor gives them."""
        starts = _LEVELS * torch.arange(_CHANNELS, dtype=torch.int32, device=device)
        places = self.levels.to(device) + starts[:, None]
        values = self.values.to(device).flatten().index_select(0, places.flatten())
        frame = values.view(self.levels.shape)
        return frame.unsqueeze(2).expand(-1, -1, self.frames, -1).flatten(1)


class ImageProcessor:
    """A model's own, for one still image at a time."""

    def __init__(self, processor: Any) -> None:
        """`processor`: the image processor that transformers loads."""
        self._processor = processor
        self._values = self._table()

    def __call__(self, image: Image.Image) -> ImageInputs:
        out = self._run(image) if self._values is None else self._cut(image)
        pixels, grid = out["pixel_values"], out["image_grid_thw"][0]
        return ImageInputs(
            pixels=pixels if self._values is None else self._compact(pixels, self._values),
            grid=grid,
            tokens=int(grid.prod()) // self._processor.merge_size**2,
        )

    def _run(self, image: Image.Image, **how: bool) -> Any:
        return self._processor(images=[image], return_tensors="pt", **how)

    def _cut(self, image: Image.Image, **how: bool) -> Any:
        """Without arithmetic: patches of the image's own levels."""
        return self._run(image, do_rescale=False, do_normalize=False, **how)

    def _frame(self, patches: Tensor) -> Tensor:
        """[N, channels, pixels of a patch] of the first frame."""
        frames = self._processor.temporal_patch_size
        return patches.view(len(patches), _CHANNELS, frames, -1)[:, :, 0]

    def _compact(self, levels: Tensor, values: Tensor) -> Levels:
        frames = self._processor.temporal_patch_size
        return Levels(
            levels=self._frame(levels).clone(memory_format=torch.contiguous_format),
            values=values,
            frames=frames,
        )

    def _table(self) -> Tensor | None:
        """[channels, 256], read from an image of noise; none where it does not give back, to the
        last bit, what the processor makes of that image and of a darker one."""
        side = _TRIAL_SIDE * self._processor.patch_size * self._processor.merge_size
        noise = np.random.default_rng(0).integers(256, size=(side, side, 3), dtype=np.uint8)
        images = [Image.fromarray(pixels) for pixels in (noise, noise // 2)]
        levels = [self._cut(image, do_resize=False)["pixel_values"] for image in images]
        wanted = [self._run(image, do_resize=False)["pixel_values"] for image in images]
        if any(one.dtype != torch.uint8 for one in levels):
            return None
        values = torch.zeros(_CHANNELS, _LEVELS, dtype=wanted[0].dtype)
        place, number = self._frame(levels[0]).long(), self._frame(wanted[0])
        every = same = True
        for channel in range(_CHANNELS):
            met = place[:, channel].flatten()
            values[channel, met] = number[:, channel].flatten()
            every &= bool(met.bincount(minlength=_LEVELS).all())
        for some, want in zip(levels, wanted, strict=True):
            same &= torch.equal(self._compact(some, values).to(torch.device("cpu")), want)
        return values if every and same else None
