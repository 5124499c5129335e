"""One pixel budget: what the store returns, the model's processor leaves as it is."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from medrl.configs.errors import UserError
from medrl.data.image_files import ImageProblem
from medrl.data.images import MIN_PIXELS, ImageStore, fit, pixel_hash

sides = st.integers(1, 5000)
BUDGET = 401_408  # pixels, as in Med-R1's scripts


def drawn(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def store(folder: Path, **options: int) -> ImageStore:
    return ImageStore(folder, **{"max_pixels": BUDGET, "factor": 28, **options})


@given(sides, sides, st.sampled_from([28, 32]), st.integers(3, 600))
@example(20_000, 100, 28, 4)  # thin, and a budget of 4 squares
@example(20_000, 100, 28, 512)  # scaled and cut to the grid, 320 times as wide as high
@example(13, 2600, 28, 512)  # thinner than a square
@example(1, 200, 28, 5)
@example(100, 101, 28, 5)
def test_a_fitted_size_is_on_the_grid_and_within_the_budget(
    width: int, height: int, factor: int, budget: int
) -> None:
    least, most = 3 * factor**2, budget * factor**2
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(ImageProblem, match="over 200 times"):
            fit(width, height, factor, least, most)
        return
    new = fit(width, height, factor, least, most)
    assert new[0] % factor == new[1] % factor == 0
    assert least <= new[0] * new[1] <= most
    assert max(new) <= 200 * min(new)
    assert fit(*new, factor, least, most) == new
    assert fit(height, width, factor, least, most) == new[::-1] or width == height


@given(st.integers(56, 5000), st.integers(56, 5000))
def test_ordinary_sizes_become_what_the_processor_of_qwen2_vl_would_make(
    width: int, height: int
) -> None:
    size = fit(width, height, 28, MIN_PIXELS, BUDGET)
    assert size[::-1] == smart_resize(height, width, 28, MIN_PIXELS, BUDGET)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1500), st.integers(1, 1500), st.sampled_from([4, 7, 64, 512, 1280]))
@example(2000, 10, 4)
@example(10, 2000, 512)
def test_the_processor_leaves_the_grid_as_the_store_made_it(
    width: int, height: int, budget: int
) -> None:
    if max(width, height) > 200 * min(width, height):
        return
    size = fit(width, height, 28, MIN_PIXELS, budget * 28**2)
    made = Qwen2VLImageProcessor()(images=[Image.new("RGB", size)], return_tensors="pt")
    _, rows, columns = made["image_grid_thw"][0].tolist()
    assert (columns * 14, rows * 14) == size


@pytest.mark.parametrize(("width", "height"), [(84, 84), (30, 400), (900, 1100)])
def test_the_processor_of_qwen3_vl_is_served_by_its_own_bounds(
    tmp_path: Path, width: int, height: int
) -> None:
    """Patches of 16 pixels and at least 256 x 256: its preprocessor_config.json says so."""
    drawn(width, height).save(tmp_path / "a.png")
    processor = Qwen2VLImageProcessor(
        patch_size=16, size={"shortest_edge": 65_536, "longest_edge": 16_777_216}
    )
    images = store(tmp_path, factor=32, min_pixels=processor.size["shortest_edge"])
    loaded = images.load("a.png")
    made = processor(images=[loaded.image], return_tensors="pt")
    _, rows, columns = made["image_grid_thw"][0].tolist()
    assert (columns * 16, rows * 16) == (loaded.width, loaded.height)


def test_the_processor_leaves_the_pixels_as_the_store_made_them(tmp_path: Path) -> None:
    """Its values are those of the store's image, normalised: nothing is resampled twice."""
    drawn(301, 207).save(tmp_path / "a.png")
    loaded = store(tmp_path, max_pixels=200 * 28**2).load("a.png")
    processor = Qwen2VLImageProcessor()
    made = processor(images=[loaded.image], return_tensors="pt")["pixel_values"].numpy()
    pixels = np.asarray(loaded.image, dtype=np.float64) / 255
    want = (pixels - processor.image_mean) / processor.image_std
    assert np.allclose(np.sort(made[:, :], axis=None)[::2], np.sort(want, axis=None), atol=1e-5)


def test_an_image_already_on_the_grid_keeps_its_pixels(tmp_path: Path) -> None:
    image = drawn(84, 56)
    image.save(tmp_path / "a.png")
    loaded = store(tmp_path).load("a.png")
    assert (loaded.width, loaded.height) == (84, 56)
    assert np.array_equal(np.asarray(loaded.image), np.asarray(image))
    assert loaded.sha256 == pixel_hash(image)


def test_a_blank_has_the_size_and_visual_tokens_of_its_image_and_a_hash_of_its_own(
    tmp_path: Path,
) -> None:
    drawn(300, 120).save(tmp_path / "a.png")
    drawn(300, 120, seed=1).save(tmp_path / "b.png")
    drawn(84, 84).save(tmp_path / "c.png")
    images = store(tmp_path)
    seen, blank = images.load("a.png"), images.blank("a.png")
    assert blank.image.size == (blank.width, blank.height) == seen.image.size
    assert blank.image.getcolors() == [(blank.width * blank.height, (128, 128, 128))]
    assert blank.sha256 == pixel_hash(blank.image) != seen.sha256
    assert blank.sha256 == images.blank("b.png").sha256 != images.blank("c.png").sha256
    assert images.load("a.png") is seen  # not blanked for those who see
    patches = Qwen2VLImageProcessor()(images=[seen.image, blank.image])["image_grid_thw"]
    assert (patches[0] == patches[1]).all()


@pytest.mark.parametrize("size", [(392, 392), (84, 84), (640, 100), (56, 56), (30, 2000)])
def test_a_small_image_has_about_the_fewest_pixels_and_the_processor_leaves_it_alone(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    drawn(*size).save(tmp_path / "a.png")
    images = store(tmp_path)
    seen, small = images.load("a.png"), images.small("a.png")
    assert small.image.size == (small.width, small.height)
    assert images.min_pixels <= small.width * small.height <= 2 * images.min_pixels
    assert small.sha256 == pixel_hash(small.image)
    assert images.load("a.png") is seen
    assert (small.sha256 == seen.sha256) == (small.image.size == seen.image.size)
    (grid,) = Qwen2VLImageProcessor()(images=[small.image])["image_grid_thw"]
    assert grid.tolist() == [1, small.height // 14, small.width // 14]


@pytest.mark.parametrize(("least", "most"), [(1, 448 * 448), (3136, 3136), (3000, 4000)])
def test_a_small_image_keeps_narrow_bounds(tmp_path: Path, least: int, most: int) -> None:
    """A model may take images of any size, or the user allow hardly more than the model's least."""
    drawn(392, 200).save(tmp_path / "a.png")
    small = ImageStore(tmp_path, most, 28, min_pixels=least).small("a.png")
    assert least <= small.width * small.height <= most
    assert small.width * small.height <= 2 * max(least, 28 * 28)


def test_384_pixels_become_392_as_in_the_paper(tmp_path: Path) -> None:
    image = drawn(384, 384)
    image.save(tmp_path / "a.png")
    loaded = store(tmp_path).load("a.png")
    assert loaded.image.size == (loaded.width, loaded.height) == (392, 392)
    bicubic = image.resize((392, 392), Image.Resampling.BICUBIC)
    assert loaded.sha256 == pixel_hash(bicubic)


def test_the_hash_tells_size_and_pixels_apart() -> None:
    square, row = Image.new("RGB", (2, 2)), Image.new("RGB", (4, 1))
    other = Image.new("RGB", (2, 2), (0, 0, 1))
    assert len({pixel_hash(square), pixel_hash(row), pixel_hash(other)}) == 3


def test_the_hash_is_the_same_in_another_process(tmp_path: Path) -> None:
    drawn(131, 77).save(tmp_path / "a.jpg")
    code = (
        "import sys, pathlib; from medrl.data.images import ImageStore;"
        f"print(ImageStore(pathlib.Path(sys.argv[1]), {BUDGET}, 28).load('a.jpg').sha256)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == store(tmp_path).load("a.jpg").sha256


def test_an_image_is_decoded_once_although_many_threads_ask_at_once(tmp_path: Path) -> None:
    for n in range(4):
        drawn(300, 300, n).save(tmp_path / f"{n}.png")
    images = store(tmp_path)
    together = threading.Barrier(16)

    def load(n: int) -> int:
        together.wait()
        return id(images.load(f"{n % 4}.png").image)

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(load, range(16)))
    assert images.decoded == 4
    assert len(set(found)) == 4


def test_the_cache_drops_what_was_used_longest_ago(tmp_path: Path) -> None:
    for n in range(3):
        drawn(56, 56, n).save(tmp_path / f"{n}.png")
    images = store(tmp_path, cache_bytes=2 * 56 * 56 * 3)
    for name in ("0.png", "1.png", "0.png", "2.png", "0.png"):  # 2 drops 1, not 0
        images.load(name)
    assert images.decoded == 3
    images.load("1.png")
    assert images.decoded == 4


def test_without_a_cache_every_load_decodes(tmp_path: Path) -> None:
    drawn(56, 56).save(tmp_path / "a.png")
    images = store(tmp_path, cache_bytes=0)
    assert images.load("a.png").sha256 == images.load("a.png").sha256
    assert images.decoded == 2


def test_a_bad_image_is_named_and_may_be_mended(tmp_path: Path) -> None:
    images = store(tmp_path)
    with pytest.raises(UserError, match=r"'a.png' in .*: does not exist"):
        images.load("a.png")
    drawn(56, 56).save(tmp_path / "a.png")
    assert images.load("a.png").width == 56


def test_a_path_out_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    drawn(56, 56).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"leaves the image root"):
        store(tmp_path / "root").load("../a.png")


def test_a_budget_below_the_smallest_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.max_pixels = 784 is too small"):
        store(tmp_path, max_pixels=784)
