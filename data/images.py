"""Images: decoded once, to RGB, on the grid of the model's patches. Needs Pillow.

One pixel budget, one place: what `ImageStore` returns is what engine and learner see, since the
model's own processor then finds nothing to resize (tested against transformers).
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from medrl.configs.errors import UserError
from medrl.data.image_files import MAX_ASPECT, ImageProblem, check_aspect, decode, locate

MIN_PIXELS = 56 * 56
"""Smaller images are enlarged, as the processors of Qwen2-VL and Qwen2.5-VL do."""

MID_GREY = (128, 128, 128)
"""What a blanked image shows: 0 or near it once the processors have normalised it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedImage:
    """An image as engine and learner see it. Do not change `image`: it is shared."""

    image: Image.Image  # RGB
    width: int  # pixels, a multiple of the store's factor
    height: int  # pixels, likewise
    sha256: str  # of mode, size and pixels


class ImageStore:
    """Loads images below `root`, each decoded once while it stays in the cache. Thread-safe."""

    def __init__(
        self,
        root: Path,
        max_pixels: int,
        factor: int,
        cache_bytes: int = 1 << 30,
        *,
        min_pixels: int = MIN_PIXELS,
    ) -> None:
        """`factor`: patch size times merge size. `cache_bytes`: pixels kept in memory, oldest use
        dropped first. `min_pixels`: the processor's `size["shortest_edge"]`. Raises `UserError`
        where no image can have between `min_pixels` and `max_pixels` pixels."""
        if max_pixels // factor**2 < -(-min_pixels // factor**2):
            raise UserError(
                f"data.max_pixels = {max_pixels} is too small for this model, which takes images "
                f"of at least {min_pixels} pixels in squares of {factor} x {factor}"
            )
        self.root = root
        self.max_pixels = max_pixels
        self.min_pixels = min_pixels
        self.factor = factor
        self.cache_bytes = cache_bytes
        self.decoded = 0  # files read so far
        self._bytes = 0
        self._cache: OrderedDict[str, LoadedImage] = OrderedDict()
        self._running: dict[str, Future[LoadedImage]] = {}
        self._lock = threading.Lock()

    @classmethod
    def for_model(
        cls, root: Path, image_processor: Any, max_pixels: int, cache_bytes: int = 1 << 30
    ) -> ImageStore:
        """The store whose images a model's own processor (transformers') leaves as they are."""
        factor, least, most = pixel_limits(image_processor, max_pixels)
        return cls(root, most, factor, cache_bytes, min_pixels=least)

    def load(self, path: str) -> LoadedImage:
        """Return the image at `path`, relative to the root. Raises `UserError` naming it."""
        with self._lock:
            if path in self._cache:
                self._cache.move_to_end(path)
                return self._cache[path]
            future = self._running.get(path)
            if mine := future is None:
                future = self._running[path] = Future()
        if not mine:
            return future.result()  # another thread is decoding it
        try:
            loaded = self._read(path)
        except BaseException as error:
            with self._lock:
                del self._running[path]
            future.set_exception(error)
            raise
        self._keep(path, loaded)
        future.set_result(loaded)
        return loaded

    def blank(self, path: str) -> LoadedImage:
        """A plain grey image of the size of the one at `path`, thus as many visual tokens; its
        hash is its own. Raises `UserError` where that one cannot be loaded."""
        seen = self.load(path)
        grey = Image.new("RGB", (seen.width, seen.height), MID_GREY)
        return replace(seen, image=grey, sha256=pixel_hash(grey))

    def small(self, path: str) -> LoadedImage:
        """The image at `path` with about as few pixels as the model takes. Raises `UserError`."""
        square = self.factor**2
        most = min(2 * -(-self.min_pixels // square) * square, self.max_pixels)
        return self._scaled(self.load(path).image, most)

    def _read(self, path: str) -> LoadedImage:
        try:
            return self._scaled(decode(locate(self.root, path)), self.max_pixels)
        except ImageProblem as problem:
            raise UserError(f"image {path!r} in {self.root}: {problem}") from problem

    def _scaled(self, image: Image.Image, max_pixels: int) -> LoadedImage:
        size = fit(*image.size, self.factor, self.min_pixels, max_pixels)
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        return LoadedImage(image=image, width=size[0], height=size[1], sha256=pixel_hash(image))

    def _keep(self, path: str, loaded: LoadedImage) -> None:
        with self._lock:
            del self._running[path]
            self.decoded += 1
            self._cache[path] = loaded
            self._bytes += _num_bytes(loaded)
            while self._bytes > self.cache_bytes:
                _, oldest = self._cache.popitem(last=False)
                self._bytes -= _num_bytes(oldest)


def _num_bytes(loaded: LoadedImage) -> int:
    return loaded.width * loaded.height * 3


def pixel_limits(image_processor: Any, max_pixels: int) -> tuple[int, int, int]:
    """Side of a visual token's square, fewest and most pixels of an image: what the model's
    processor takes and `max_pixels` allows."""
    factor = image_processor.patch_size * image_processor.merge_size
    size = image_processor.size  # for these families, numbers of pixels and not lengths of edges
    return factor, size["shortest_edge"], min(max_pixels, size["longest_edge"])


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 of an image's mode, size and pixels, in hexadecimal."""
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def fit(width: int, height: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return (width, height) in multiples of `factor`, within the pixel bounds, aspect kept.

    The rule of Qwen2-VL's processor: round, then scale by the square root of what is too much or
    too little. Where that leaves the bounds (thin images, narrow bounds), the nearest grid within
    them. A fixed point: `fit(*fit(...)) == fit(...)`, and the processor leaves it as it is.
    """
    check_aspect(width, height)
    least, most = -(-min_pixels // factor**2), max_pixels // factor**2  # in squares of the grid
    columns, rows = round(width / factor), round(height / factor)
    if columns * rows > most:
        scale = math.sqrt(max_pixels / (width * height)) / factor
        columns, rows = math.floor(width * scale), math.floor(height * scale)
    elif columns * rows < least:
        scale = math.sqrt(min_pixels / (width * height)) / factor
        columns, rows = math.ceil(width * scale), math.ceil(height * scale)
    if not _allowed(columns, rows, least, most):
        columns, rows = _nearest_grid(width / height, least, most)
    return columns * factor, rows * factor


def _allowed(columns: int, rows: int, least: int, most: int) -> bool:
    short, long = sorted((columns, rows))
    return short >= 1 and long <= MAX_ASPECT * short and least <= columns * rows <= most


def _nearest_grid(aspect: float, least: int, most: int) -> tuple[int, int]:
    """The grid of `least` to `most` squares whose aspect is nearest, and of those the largest."""
    slope = max(aspect, 1 / aspect)
    grids: list[tuple[float, int, int, int]] = []
    for short in range(1, math.isqrt(most) + 1):
        low = max(short, -(-least // short))
        high = min(MAX_ASPECT * short, most // short)
        if low <= high:
            long = min(max(round(slope * short), low), high)
            grids.append((abs(math.log(long / short / slope)), -long * short, long, short))
    if not grids:
        raise ImageProblem(f"has no size of {least} to {most} squares with an aspect below 200")
    _, _, long, short = min(grids)
    return (long, short) if aspect >= 1 else (short, long)
