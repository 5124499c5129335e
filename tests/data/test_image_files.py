"""Files that are no good images are refused with the reason; all good ones become 8-bit RGB."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medrl.data.image_files import (
    ImageProblem,
    PathProblem,
    check_images,
    decode,
    leaves_root,
    locate,
)

GRADIENT = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
Write = Callable[[Path], object]


def noise(width: int = 64, height: int = 64) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def truncated(path: Path, form: str) -> None:
    noise().save(path, format=form)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def animated(path: Path, form: str) -> None:
    frames = [Image.new("RGB", (64, 64), (n * 90, 0, 0)) for n in range(3)]
    frames[0].save(path, format=form, save_all=True, append_images=frames[1:])


def bomb(path: Path) -> None:
    Image.new("1", (9000, 9000)).save(path, format="PNG")


BAD: dict[str, tuple[Write, str]] = {
    "empty.png": (lambda path: path.write_bytes(b""), "is empty"),
    "text.png": (lambda path: path.write_text("no image"), "not an image"),
    "folder.png": (lambda path: path.mkdir(), "not a file"),
    "pipe.png": (lambda path: os.mkfifo(path), "not a file"),
    "truncated.png": (lambda path: truncated(path, "PNG"), "cannot be read"),
    "truncated.jpg": (lambda path: truncated(path, "JPEG"), "cannot be read"),
    "truncated.bmp": (lambda path: truncated(path, "BMP"), "cannot be read"),
    "truncated.tif": (lambda path: truncated(path, "TIFF"), "cannot be read|not an image"),
    "animated.gif": (lambda path: animated(path, "GIF"), "3 frames"),
    "animated.png": (lambda path: animated(path, "PNG"), "3 frames"),
    "pages.tif": (lambda path: animated(path, "TIFF"), "3 frames"),
    "huge.png": (bomb, "81 megapixels, more than 64"),
    "thin.png": (lambda path: Image.new("L", (1005, 5)).save(path), "over 200 times"),
    # A program for Ghostscript, which Pillow would start.
    "script.png": (lambda path: noise().save(path, format="EPS"), "not an image"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    write, reason = BAD[name]
    write(tmp_path / name)
    with pytest.raises(ImageProblem, match=reason):
        decode(tmp_path / name)


def test_all_images_are_checked_and_each_once(tmp_path: Path) -> None:
    for name, (write, _) in BAD.items():
        write(tmp_path / name)
    noise().save(tmp_path / "good (1) & [2] - Copy.png")
    names = ["good (1) & [2] - Copy.png", *BAD, "missing.png"]
    found = check_images(tmp_path, names * 2)
    assert set(found) == {*BAD, "missing.png"}
    assert str(found["missing.png"]) == "does not exist"


@pytest.mark.parametrize("path", ["../a.png", "x/../../a.png", "/etc/passwd", "a\0.png", " ", ""])
def test_a_path_that_cannot_lie_below_the_root_is_refused(tmp_path: Path, path: str) -> None:
    assert leaves_root(path)
    with pytest.raises(PathProblem):
        locate(tmp_path, path)


def test_a_link_out_of_the_root_is_refused_and_one_within_is_not(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    (tmp_path / "root2").mkdir()
    noise().save(root / "inner" / "a.png")
    noise().save(tmp_path / "root2" / "b.png")
    (root / "within").symlink_to("inner")
    (root / "outside").symlink_to("../root2")  # its name starts like the root's
    assert decode(locate(root, "within/a.png")).size == (64, 64)
    with pytest.raises(PathProblem, match="outside the image root"):
        locate(root, "outside/b.png")


def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    noise().save(tmp_path / "real" / "a.png")
    (tmp_path / "root").symlink_to("real")
    assert check_images(tmp_path / "root", ["a.png"]) == {}


def rgb(path: Path) -> np.ndarray:
    image = decode(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bits_are_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    Image.fromarray(GRADIENT.astype(np.uint16)).save(tmp_path / name)
    pixels = rgb(tmp_path / name)
    assert np.abs(pixels - (GRADIENT / 257)[..., None]).max() <= 1


def test_12_bits_in_a_16_bit_file_span_the_whole_range(tmp_path: Path) -> None:
    Image.fromarray((GRADIENT / 16).astype(np.uint16)).save(tmp_path / "a.png")
    pixels = rgb(tmp_path / "a.png")
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert np.abs(pixels - (GRADIENT / 257)[..., None]).max() <= 1


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_signed_and_real_values_span_their_own_range(tmp_path: Path, dtype: type) -> None:
    hounsfield = (GRADIENT / 65535 * 4000 - 1000).astype(dtype)
    Image.fromarray(hounsfield).save(tmp_path / "a.tif")
    pixels = rgb(tmp_path / "a.tif")
    assert np.abs(pixels - (GRADIENT / 257)[..., None]).max() <= 1


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    values = np.full((64, 64), np.nan, dtype=np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ImageProblem, match="not finite"):
        decode(tmp_path / "a.tif")


def test_a_constant_image_of_16_bits_is_one_gray(tmp_path: Path) -> None:
    Image.fromarray(np.full((64, 64), 30_000, dtype=np.uint16)).save(tmp_path / "a.png")
    assert set(rgb(tmp_path / "a.png").ravel()) == {117}


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr", "RGB"])
def test_every_mode_keeps_its_picture(tmp_path: Path, mode: str) -> None:
    half = Image.new("RGB", (64, 64), "black")
    half.paste("white", (0, 0, 32, 64))
    half.convert(mode).save(tmp_path / "a.tif")
    assert np.abs(rgb(tmp_path / "a.tif") - np.asarray(half)).max() <= 2


def test_a_palette_gives_its_colours_not_its_indices(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), (200, 30, 60))
    image.quantize(4).save(tmp_path / "a.png")
    assert np.abs(rgb(tmp_path / "a.png") - np.array([200, 30, 60])).max() <= 2


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(tmp_path: Path, mode: str) -> None:
    """What lies under them is noise that no viewer shows."""
    image = Image.new("RGBA", (64, 64), (10, 10, 10, 255))
    image.paste((90, 90, 90, 0), (0, 0, 32, 64))
    image.convert(mode).save(tmp_path / "a.png")
    pixels = rgb(tmp_path / "a.png")
    assert (pixels[:, :32] == 255).all()
    assert (np.abs(pixels[:, 32:] - 10) <= 1).all()


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    noise(64, 32).save(tmp_path / "a.jpg", exif=exif)
    assert decode(tmp_path / "a.jpg").size == (32, 64)
