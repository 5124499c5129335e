"""Images are read once while they stay in the cache, and a step's are read side by side."""

from __future__ import annotations

import multiprocessing
import shutil
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from made_groups import (
    SIZES,
    PlainStepper,
    examples,
    image_store,
    mixed_batch,
    scored_group,
    settings,
)
from PIL import Image

from medrl.configs.errors import LearnerError, UserError
from medrl.data.images import ImageStore
from medrl.learner.images import ImageCache, Seen
from medrl.learner.imitate import Imitator
from medrl.learner.model import PromptReader, load_policy
from medrl.learner.update import Updater

NAMES = tuple(SIZES)
BYTES = {name: 3 * height * width for name, (height, width) in SIZES.items()}


@pytest.fixture
def make(tiny_models: dict[str, Path], image_root: Path, readers: dict[str, PromptReader]) -> Any:
    def make(max_bytes: int = 2**30, root: Path = image_root) -> tuple[ImageCache, Any]:
        store = image_store(tiny_models["qwen2_vl"], root)
        return ImageCache(store, readers["qwen2_vl"].images._process, max_bytes), store

    return make


def seen(*names: str) -> list[Seen]:
    return [Seen(name, small=False) for name in names]


def test_the_cache_holds_as_many_bytes_as_it_may(make: Any) -> None:
    """Three bytes a pixel: what fits by that count is not decoded again, and all else is."""
    cache, store = make(sum(BYTES.values()))
    for _ in range(3):
        cache.read(seen(*NAMES))
    assert cache.nbytes == sum(BYTES.values())
    assert store.decoded == len(NAMES)
    less, store = make(sum(BYTES.values()) - 1)
    less.read(seen(*NAMES))
    assert less.nbytes == sum(BYTES.values()) - BYTES["a.png"]  # the first is the oldest
    less.get(less.hash(Seen("b.png", small=False)))
    assert store.decoded == len(NAMES)
    less.get(less.hash(Seen("a.png", small=False)))
    assert store.decoded == len(NAMES) + 1
    less.get(less.hash(Seen("b.png", small=False)))  # asked for since "c.png" was
    assert store.decoded == len(NAMES) + 1


def test_what_is_asked_for_now_is_not_dropped_for_what_else_is(make: Any) -> None:
    """The image kept longest leaves, unless it is among those a step needs."""
    cache, store = make(BYTES["a.png"] + max(BYTES["b.png"], BYTES["c.png"]))
    cache.read(seen("a.png", "b.png"))
    cache.read(seen("a.png", "c.png"))
    assert store.decoded == 3
    cache.get(cache.hash(Seen("a.png", small=False)))
    assert store.decoded == 3


def test_an_image_asked_for_twice_is_read_once(make: Any) -> None:
    cache, store = make()
    cache.read(seen("a.png", "b.png", "a.png"))
    assert store.decoded == 2


def test_two_files_of_one_image_are_kept_once(make: Any, image_root: Path, tmp_path: Path) -> None:
    for copy in ("a.png", "again.png"):
        shutil.copy(image_root / "a.png", tmp_path / copy)
    cache, _ = make(root=tmp_path)
    cache.read(seen("a.png", "again.png"))
    assert cache.nbytes == BYTES["a.png"]


def test_a_file_that_is_no_image_is_named_and_the_others_stay(
    make: Any, image_root: Path, tmp_path: Path
) -> None:
    shutil.copytree(image_root, tmp_path / "images")
    (tmp_path / "images" / "b.png").write_bytes(b"no picture")
    cache, _ = make(root=tmp_path / "images")
    for _ in range(2):
        with pytest.raises(UserError, match=r"image 'b\.png'"):
            cache.read(seen(*NAMES))
    cache.read(seen("a.png"))
    shutil.copy(image_root / "b.png", tmp_path / "images")
    cache.read(seen(*NAMES))
    assert cache.nbytes == sum(BYTES.values())


def test_a_file_that_changed_since_its_image_left_the_cache_is_named(
    make: Any, image_root: Path, tmp_path: Path
) -> None:
    shutil.copytree(image_root, tmp_path / "images")
    cache, _ = make(1, root=tmp_path / "images")
    cache.read(seen("a.png", "b.png"))
    shutil.copy(image_root / "c.png", tmp_path / "images" / "a.png")
    with pytest.raises(LearnerError, match=r"image a\.png changed while the run was using it"):
        cache.read(seen("b.png", "a.png"))


class Meeting:
    """A source that gives no image before so many are asked for at once."""

    def __init__(self, source: Any, number: int) -> None:
        self._source = source
        self._barrier = threading.Barrier(number, timeout=60)

    def load(self, path: str) -> Any:
        self._barrier.wait()
        return self._source.load(path)

    small = load


def test_a_step_reads_its_images_side_by_side(
    tiny_models: dict[str, Path], readers: dict[str, PromptReader], image_root: Path
) -> None:
    model = tiny_models["qwen2_vl"]
    images, plain = image_store(model, image_root), readers["qwen2_vl"]
    policy = load_policy(str(model), torch.float32, forbidden=plain.forbidden)
    chosen = settings(model, image_root)
    results = []
    for source in (images, Meeting(images, len(NAMES))):
        reader = PromptReader(str(model), source)
        stepper = PlainStepper(policy, reader)
        metrics = Updater(stepper, reader, chosen).update(mixed_batch(plain), version=0)
        results.append((metrics.loss, metrics.group_gaps))
        reader = PromptReader(str(model), source)
        loss = Imitator(PlainStepper(policy, reader), reader, chosen).imitate(examples(), 0).loss
        results.append((loss, ()))
    assert results[:2] == results[2:]


def test_a_bad_file_is_refused_before_any_step(
    tiny_models: dict[str, Path], image_root: Path, tmp_path: Path
) -> None:
    shutil.copytree(image_root, tmp_path / "images")
    model = tiny_models["qwen2_vl"]
    plain = PromptReader(str(model), image_store(model, image_root))
    batch = [
        scored_group(plain, (name,), seed=seed, rewards=[0.0, 1.0])
        for seed, name in enumerate(NAMES)
    ]
    (tmp_path / "images" / "c.png").write_bytes(b"no picture")
    reader = PromptReader(str(model), image_store(model, tmp_path / "images"))
    stepper = PlainStepper(load_policy(str(model), torch.float32), reader)
    with pytest.raises(LearnerError, match=r"image 'c\.png' in "):
        Updater(stepper, reader, settings(model, tmp_path / "images")).update(batch, version=0)
    assert stepper.forwards == stepper.steps == 0


def grown(model: Path, folder: Path, images: int) -> tuple[int, int]:
    """In a process of its own: bytes it has grown by for so many images, and bytes kept of them."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(model)
    reader = PromptReader(str(model), ImageStore.for_model(folder, processor, 2**20, 0))
    generator = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    before = 0
    for number in range(images):
        drawn = generator.integers(256, size=(336, 336, 3), dtype=np.uint8)
        Image.fromarray(drawn).save(folder / "drawn.png", compress_level=0)
        (folder / "drawn.png").rename(folder / f"{number}.png")
        if number == 32:  # what all need is there by now
            before = psutil.Process().memory_info().rss - reader.images.nbytes
        seen = Seen(f"{number}.png", small=False)
        reader.image(reader.images.hash(seen)).pixels.to(torch.device("cpu"))
    return psutil.Process().memory_info().rss - before, reader.images.nbytes


def test_a_process_grows_by_little_more_than_is_kept(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Not by the holes that processing leaves between images: that was three times as much."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        by, kept = process.submit(grown, tiny_models["qwen2_vl"], tmp_path, 400).result()
    assert kept > 400 * 100_000
    assert by < 1.5 * kept
