"""Hugging Face data sets, as folders and Parquet: images inside them become files once."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
from PIL import Image

from medrl.configs.errors import UserError
from medrl.configs.schema import DataConfig
from medrl.data.images import ImageStore
from medrl.data.load import LoadedPrompts, load_prompts

COLUMNS = {"question": "Q", "answer": "gold", "image": "picture"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDRL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


def picture(gray: int) -> Image.Image:
    return Image.new("L", (56, 56), gray)


def content(gray: int) -> bytes:
    buffer = io.BytesIO()
    picture(gray).save(buffer, "PNG")
    return buffer.getvalue()


def with_pictures(*grays: int, **columns: Any) -> datasets.Dataset:
    rows = {
        "Q": ["What?"] * len(grays),
        "options": [["CT", "MRI"]] * len(grays),
        "gold": [gray % 2 for gray in grays],
        "picture": [picture(gray) for gray in grays],
        **columns,
    }
    return datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())


def load(name: Path | str, split: Any = "train", **config: Any) -> LoadedPrompts:
    config = {"columns": COLUMNS, **config}
    return load_prompts(
        DataConfig(format="huggingface", train=str(name), test=str(name), **config), split
    )


def grays(loaded: LoadedPrompts) -> list[int]:
    store = ImageStore(loaded.image_root, 56 * 56, 28)
    return [
        store.load(path).image.getpixel((0, 0))[0]
        for prompt in loaded.prompts
        for path in prompt.images
    ]


def test_images_in_a_folder_on_disk_become_paths(tmp_path: Path, cache: Path) -> None:
    with_pictures(10, 21).save_to_disk(tmp_path / "set")
    loaded = load(tmp_path / "set")
    assert [prompt.answer for prompt in loaded.prompts] == ["A", "B"]
    assert loaded.image_root == cache
    assert grays(loaded) == [10, 21]


def test_an_image_is_written_once_however_often_it_occurs(tmp_path: Path, cache: Path) -> None:
    with_pictures(10, 10, 21).save_to_disk(tmp_path / "set")
    first = load(tmp_path / "set")
    files = [file for file in cache.rglob("*") if file.is_file()]
    times = [file.stat().st_mtime_ns for file in files]
    assert len(files) == 2
    assert load(tmp_path / "set") == first
    assert [file.stat().st_mtime_ns for file in files] == times


def test_several_images_a_row_keep_their_order(tmp_path: Path) -> None:
    rows = {
        "question": ["Which is brighter?"],
        "options": [["first", "second"]],
        "answer": ["second"],
        "images": [[picture(9), picture(200)]],
    }
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "options": datasets.List(datasets.Value("string")),
            "answer": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
        }
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    loaded = load(tmp_path / "set", columns={})
    assert grays(loaded) == [9, 200]


def test_parquet_files_are_read_as_they_are(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "set").mkdir()
    for n, gray in enumerate((10, 21)):
        with_pictures(gray, id=[f"q{n}"]).to_parquet(tmp_path / "set" / f"{n}.parquet")
    assert grays(load(tmp_path / "set")) == [10, 21]
    assert grays(load(tmp_path / "set" / "1.parquet")) == [21]


def test_splits_of_one_folder_are_kept_apart(tmp_path: Path) -> None:
    splits = {"train": with_pictures(1, 2), "validation": with_pictures(3)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    assert grays(load(tmp_path / "set")) == [1, 2]
    assert grays(load(f"{tmp_path / 'set'}:validation", "test")) == [3]
    with pytest.raises(UserError, match="no split 'test', only train, validation: name one"):
        load(tmp_path / "set", "test")


def test_class_labels_are_read_by_name(tmp_path: Path) -> None:
    labels = datasets.ClassLabel(names=["CT", "MR"])
    data = with_pictures(10, 21, modality=[1, 0]).cast_column("modality", labels)
    data.save_to_disk(tmp_path / "set")
    assert [prompt.modality for prompt in load(tmp_path / "set").prompts] == ["MRI", "CT"]


def test_paths_in_a_data_set_are_relative_to_the_image_root(tmp_path: Path) -> None:
    rows = {"Q": ["x"], "options": [["a", "b"]], "gold": ["a"], "picture": ["a.png"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
    (tmp_path / "pictures").mkdir()
    picture(7).save(tmp_path / "pictures" / "a.png")
    assert grays(load(tmp_path / "set", images=str(tmp_path / "pictures"))) == [7]


def test_images_inside_win_over_a_configured_root(tmp_path: Path, cache: Path) -> None:
    with_pictures(10).save_to_disk(tmp_path / "set")
    assert load(tmp_path / "set", images=str(tmp_path)).image_root == cache


def test_an_image_inside_that_is_damaged_is_told_with_its_row(tmp_path: Path) -> None:
    cells = [{"bytes": content(5), "path": "a.png"}, {"bytes": content(6)[:60], "path": "b.png"}]
    rows = {"Q": ["x", "y"], "options": [["a", "b"]] * 2, "gold": ["a", "b"], "picture": cells}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "set.parquet")
    with pytest.raises(UserError, match=r"set.parquet: row 2: image .* cannot be read"):
        load(tmp_path / "set.parquet")
    assert len(load(tmp_path / "set.parquet", on_bad_image="skip").prompts) == 1


def test_what_is_no_data_set_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder written by save_to_disk"):
        load(tmp_path)
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(UserError, match="no Parquet that can be read"):
        load(tmp_path / "bad.parquet")


def test_a_name_the_hub_does_not_have_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as in an offline run
    with pytest.raises(UserError, match="is not a folder here, or found on the hub"):
        load("no-such-owner/no-such-set")


def test_missing_columns_are_told(tmp_path: Path) -> None:
    with_pictures(10).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match="no column 'Question'") as caught:
        load(tmp_path / "set", columns={"question": "Question"})
    assert "no column 'answer'" in caught.value.problems[1]
