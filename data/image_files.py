"""Image files: found, checked, decoded, converted to RGB. Needs Pillow and numpy."""

from __future__ import annotations

import hashlib
import math
import os
import stat
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_FILE_PIXELS = 64_000_000
"""A larger picture is refused before it is decoded: it would take 200 MB and more."""

MAX_ASPECT = 200
"""Long side over short side; the models' processors refuse more."""

# Not all that Pillow knows: some of its readers start other programs (EPS: Ghostscript).
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")

# Pillow warns on the terminal of what `_check_header` refuses, with the image's name, right after.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageProblem(ValueError):
    """An image that cannot be used; the message says why, in half a sentence."""


class PathProblem(ImageProblem):
    """An image path that leads out of the image root."""


def check_aspect(width: int, height: int) -> None:
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageProblem(
            f"is {width} x {height} pixels: one side is over {MAX_ASPECT} times the other"
        )


def locate(root: Path, path: str) -> Path:
    """Return the file at `path` below `root`; raise `PathProblem` where that is outside of it."""
    if reason := leaves_root(path):
        raise PathProblem(reason)
    found = root / path
    if not os.path.realpath(found).startswith(os.path.join(os.path.realpath(root), "")):
        raise PathProblem(
            "is a link to a file outside the image root: point data.images to where the files lie"
        )
    return found


def leaves_root(path: str) -> str:
    """Say why `path` cannot lie below a root, judged by its text alone; empty: it can."""
    if not path.strip() or "\0" in path:
        return "is not a path"
    if os.path.isabs(path):
        return "is absolute: paths are relative to data.images"
    if ".." in Path(path).parts:
        return "leaves the image root through '..'"
    return ""


def decode(path: Path) -> Image.Image:
    """Return the picture in a file, upright and in RGB. Raises `ImageProblem`.

    The header is checked before any pixel is decoded.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageProblem("is not a file")
        if status.st_size == 0:
            raise ImageProblem("is empty (0 bytes)")
        with Image.open(path, formats=_FORMATS) as image:
            _check_header(image)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except ImageProblem:
        raise
    except FileNotFoundError:
        raise ImageProblem("does not exist") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageProblem(f"has far more than {MAX_FILE_PIXELS // 10**6} megapixels") from None
    except UnidentifiedImageError:
        raise ImageProblem("is not an image that can be read") from None
    # Pillow's decoders raise nearly anything on damaged files: OSError, SyntaxError, struct.error.
    except Exception as error:
        raise ImageProblem(f"cannot be read: {error}") from error


def check_images(root: Path, paths: Iterable[str], workers: int = 0) -> dict[str, ImageProblem]:
    """Decode every image once, in threads (0: one a core, at most 16); return what is wrong."""
    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        unique = list(dict.fromkeys(paths))
        found = pool.map(lambda path: _check(root, path), unique)
        return {path: problem for path, problem in zip(unique, found, strict=True) if problem}


def identify_images(
    root: Path, paths: Iterable[str], workers: int = 0
) -> tuple[dict[str, str], dict[str, ImageProblem]]:
    """Decode every image once; return a digest of each one's pixels, and what is wrong with others.

    The same picture under another name, or saved without loss in another format, is the same.
    """
    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        unique = list(dict.fromkeys(paths))
        found = list(zip(unique, pool.map(lambda path: _identify(root, path), unique), strict=True))
    good = {path: digest for path, digest in found if isinstance(digest, str)}
    return good, {path: wrong for path, wrong in found if not isinstance(wrong, str)}


def _identify(root: Path, path: str) -> str | ImageProblem:
    try:
        image = decode(locate(root, path))
    except ImageProblem as problem:
        return problem
    digest = hashlib.sha256(f"{image.width} x {image.height}:".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def _check(root: Path, path: str) -> ImageProblem | None:
    try:
        decode(locate(root, path))
    except ImageProblem as problem:
        return problem
    return None


def _check_header(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_FILE_PIXELS:
        raise ImageProblem(
            f"has {width * height / 1e6:.0f} megapixels, more than {MAX_FILE_PIXELS // 10**6}"
        )
    check_aspect(width, height)
    # An MPO is a photograph with a preview or a second view behind it; its first image is it.
    if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
        raise ImageProblem(f"has {frames} frames: save the one that is meant as an image")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB. Transparency is laid on white; more than 8 bits are scaled."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_8_bit(np.asarray(image))).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Scale [height, width] to 0..255 without clipping.

    Whole numbers keep their scale, 16 bits or, where none is above 4095, the 12 bits of scanners
    (so slices of one series stay comparable). Anything else spans its own range.
    """
    low, high = float(pixels.min()), float(pixels.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageProblem("holds values that are not finite")
    if pixels.dtype.kind in "ui" and low >= 0 and high <= 65535:
        low, high = 0.0, 4095.0 if high <= 4095 else 65535.0
    scaled = (pixels.astype(np.float64) - low) * (255 / ((high - low) or 1))
    return np.rint(scaled).astype(np.uint8)
