"""Whatever lies in a data set is told or counted before a run starts; what is kept can be used."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medrl.configs.errors import UserError
from medrl.configs.schema import DataConfig
from medrl.data.images import ImageStore
from medrl.data.lint import lint
from medrl.data.load import load_prompts
from medrl.data.survey import survey

SIZE = (80, 60)


def frames(path: Path) -> None:
    first, second = Image.new("L", SIZE, 0), Image.new("L", SIZE, 200)
    first.save(path, save_all=True, append_images=[second])


def sixteen_bits(path: Path) -> None:
    Image.fromarray(np.full(SIZE[::-1], 40_000, dtype=np.uint16)).save(path)


def header_only(path: Path) -> None:
    """A PNG that says it has 400 megapixels, in a few bytes: nothing may be allocated for it."""
    Image.new("1", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = (20_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(bytes(content))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "huge.png": (lambda p: Image.new("1", (10_000, 10_000)).save(p), "megapixels"),
    "header.png": (header_only, "megapixels"),
    "empty.png": (lambda p: p.write_bytes(b""), "0 bytes"),
    "text.png": (lambda p: p.write_text("no image"), "not an image"),
    "moving.gif": (frames, "2 frames"),
    "moving.png": (frames, "2 frames"),
    "gone.png": (lambda p: None, "does not exist"),
    "loop.png": (lambda p: p.symlink_to(p), "outside|cannot be read|does not exist"),
}
GOOD: dict[str, Callable[[Path], Any]] = {
    "16.png": sixteen_bits,
    "16.tif": sixteen_bits,
    "cmyk.jpg": lambda p: Image.new("CMYK", SIZE, (9, 9, 9, 9)).save(p),
    "cmyk.tif": lambda p: Image.new("CMYK", SIZE, (9, 9, 9, 9)).save(p),
    "a b & (c) - Copy.bmp": lambda p: Image.new("RGB", SIZE).save(p),
    "bits.png": lambda p: Image.new("1", SIZE).save(p),
}


def omnimedvqa(root: Path, paths: list[str]) -> Path:
    (root / "QA_information").mkdir()
    records = [
        {
            "dataset": "Mura", "question_id": f"Mura_{n}", "question_type": "Disease Diagnosis",
            "question": "What?", "gt_answer": "x", "option_A": "x", "option_B": "y",
            "image_path": path, "modality_type": "X-Ray",
        }
        for n, path in enumerate(paths)
    ]  # fmt: skip
    (root / "QA_information" / "Mura.json").write_text(json.dumps(records))
    return root


def med_r1(root: Path, paths: list[str]) -> Path:
    records = [
        {"image": path, "problem": "What? A)x, B)y", "solution": "<answer> A </answer>"}
        for path in paths
    ]
    (root / "X-Ray_test.json").write_text(json.dumps(records))
    return root / "X-Ray_test.json"


def jsonl(root: Path, paths: list[str]) -> Path:
    rows = [{"question": "What?", "answer": "x", "image": path} for path in paths]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root / "rows.jsonl"


FORMATS = {"omnimedvqa": omnimedvqa, "med_r1": med_r1, "jsonl": jsonl}


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    (tmp_path / "Images").mkdir()
    for name, make in {**{name: make for name, (make, _) in BAD.items()}, **GOOD}.items():
        make(tmp_path / "Images" / name)
    return [f"Images/{name}" for name in (*BAD, *GOOD)]


def load(path: Path, format_: Any, on_bad_image: Any) -> Any:
    config = DataConfig(format=format_, train="unused", test=str(path), on_bad_image=on_bad_image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns of large images: that is ours to say
        return load_prompts(config, "test")


@pytest.mark.parametrize("format_", FORMATS)
def test_every_odd_image_is_an_error_or_a_counted_skip_in_every_format(
    tmp_path: Path, pictures: list[str], format_: str
) -> None:
    path = FORMATS[format_](tmp_path, pictures)
    with pytest.raises(UserError) as caught:
        load(path, format_, "error")
    assert len(caught.value.problems) == len(BAD)
    for told, (name, (_, reason)) in zip(caught.value.problems, BAD.items(), strict=True):
        assert name in told
        assert any(part in told for part in reason.split("|")), told
    assert len(lint(survey(path)).problems) == len(BAD)


@pytest.mark.parametrize("format_", FORMATS)
def test_what_a_skip_leaves_can_all_be_decoded(
    tmp_path: Path, pictures: list[str], format_: str
) -> None:
    loaded = load(FORMATS[format_](tmp_path, pictures), format_, "skip")
    assert len(loaded.skipped) == len(BAD)
    assert [prompt.images[0] for prompt in loaded.prompts] == [f"Images/{name}" for name in GOOD]
    store = ImageStore(loaded.image_root, 56 * 56, 28)
    for prompt in loaded.prompts:
        assert store.load(prompt.images[0]).image.mode == "RGB"


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("path", ["../outside.png", "Images/link.png", "Images/folder/in.png"])
def test_a_way_out_of_the_root_is_an_error_even_where_bad_images_are_skipped(
    tmp_path: Path, format_: str, path: str
) -> None:
    root = tmp_path / "root"
    (root / "Images").mkdir(parents=True)
    (tmp_path / "far").mkdir()
    for outside in (tmp_path / "outside.png", tmp_path / "far" / "in.png", root / "good.png"):
        Image.new("L", SIZE).save(outside)
    (root / "Images" / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "Images" / "folder").symlink_to(tmp_path / "far")
    source = FORMATS[format_](root, ["good.png", path])
    with pytest.raises(UserError, match=r"leaves the image root|outside the image root"):
        load(source, format_, "skip")
    (told,) = lint(survey(source)).problems
    assert "the image root" in told
