"""One entry for all formats: filters, images, roots, and every problem at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medrl.configs.errors import UserError
from medrl.configs.schema import DataConfig
from medrl.data.images import ImageStore
from medrl.data.load import LoadedPrompts, load_prompts, share_root


def write(root: Path, *rows: dict[str, Any], name: str = "rows.jsonl") -> Path:
    """JSON lines, and an image for each path that has none yet."""
    root.mkdir(exist_ok=True)
    defaults = {"question": "What is it?", "options": ["CT", "MRI"], "answer": "A"}
    records = [{**defaults, "id": str(n), **row} for n, row in enumerate(rows)]
    text = "\n".join(json.dumps(record) for record in records)
    (root / name).write_text(text, encoding="utf-8")
    for row in rows:
        image = root / row.get("image", "none.png")
        image.parent.mkdir(exist_ok=True)
        if not image.exists():
            Image.new("L", (60, 60), len(image.name)).save(image)
    return root / name


def load(path: Path, split: Any = "train", **config: Any) -> LoadedPrompts:
    return load_prompts(
        DataConfig(format="jsonl", train=str(path), test=str(path), **config), split
    )


def problems(path: Path, split: Any = "train", **config: Any) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        load(path, split, **config)
    return caught.value.problems


MIXED: tuple[dict[str, Any], ...] = (
    {"image": "a.png", "modality": "CT", "question_type": "Lesion Grading"},
    {"image": "b.png", "modality": "MR", "question_type": "disease diagnosis"},
    {"image": "c.png", "modality": "Endoscopy", "question_type": "Counting"},
)


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        ({}, ["0", "1", "2"]),
        ({"modalities": ("ct", "MRI")}, ["0", "1"]),
        ({"modalities": ("Endoscopy",)}, ["2"]),
        ({"question_types": ("Disease Diagnosis", "Counting")}, ["1", "2"]),
        ({"modalities": ("CT", "MRI"), "question_types": ("Disease Diagnosis",)}, ["1"]),
    ],
)
def test_filters_keep_what_is_named_when_training(
    tmp_path: Path, filters: dict[str, Any], ids: list[str]
) -> None:
    path = write(tmp_path, *MIXED)
    assert [prompt.id for prompt in load(path, **filters).prompts] == ids
    assert len(load(path, "test", **filters).prompts) == 3


def test_a_filter_that_names_nothing_there_is_told_with_what_is(tmp_path: Path) -> None:
    told = problems(
        write(tmp_path, *MIXED), modalities=("Endoscopi", "CT"), question_types=("Grading",)
    )
    assert len(told) == 2
    assert "no prompt has 'Endoscopi'; did you mean 'Endoscopy'?" in told[0]
    assert "CT, Endoscopy, MRI" in told[0]
    assert "'Grading'" in told[1]


def test_filters_that_exclude_each_other_leave_an_empty_data_set(tmp_path: Path) -> None:
    told = problems(
        write(tmp_path, *MIXED), modalities=("CT",), question_types=("Disease Diagnosis",)
    )
    assert told == (f"data.train: no prompts in {tmp_path / 'rows.jsonl'}",)


def test_bad_images_are_all_told_with_their_rows(tmp_path: Path) -> None:
    path = write(tmp_path, *MIXED)
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "c.png").unlink()
    told = problems(path)
    assert told == (
        f"{path}: line 1: image 'a.png' is empty (0 bytes)",
        f"{path}: line 3: image 'c.png' does not exist",
    )


def test_bad_images_are_skipped_and_counted_on_request(tmp_path: Path) -> None:
    path = write(tmp_path, *MIXED, {"image": "a.png"})
    (tmp_path / "a.png").write_bytes(b"")
    loaded = load(path, on_bad_image="skip")
    assert [prompt.id for prompt in loaded.prompts] == ["1", "2"]
    assert [sentence.split(": image")[0] for sentence in loaded.skipped] == [
        f"{path}: line 1",
        f"{path}: line 4",
    ]


def test_a_link_out_of_the_root_is_told_even_where_bad_images_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "data", *MIXED)
    Image.new("L", (60, 60)).save(tmp_path / "outside.png")
    (tmp_path / "data" / "a.png").unlink()
    (tmp_path / "data" / "a.png").symlink_to(tmp_path / "outside.png")
    (told,) = problems(path, on_bad_image="skip")
    assert "'a.png' is a link to a file outside" in told


def test_skipping_all_leaves_an_empty_data_set_which_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, MIXED[0])
    (tmp_path / "a.png").write_bytes(b"")
    (told,) = problems(path, on_bad_image="skip")
    assert "no prompts in" in told
    assert "is empty" in told


def test_a_wrong_image_root_is_one_problem_not_one_a_row(tmp_path: Path) -> None:
    path = write(tmp_path, *MIXED)
    (tmp_path / "elsewhere").mkdir()
    (told,) = problems(path, images=str(tmp_path / "elsewhere"))
    assert "none of the 3 images is in" in told
    (told,) = problems(path, images=str(tmp_path / "nowhere"))
    assert told == f"data.images: no such folder: {tmp_path / 'nowhere'}"


def test_images_may_lie_in_a_folder_of_their_own(tmp_path: Path) -> None:
    write(tmp_path / "pictures", MIXED[0])
    path = write(tmp_path / "questions", MIXED[0])
    (tmp_path / "questions" / "a.png").unlink()
    loaded = load(path, images=str(tmp_path / "pictures"))
    assert loaded.image_root == tmp_path / "pictures"


def test_two_splits_can_share_one_root_and_one_store(tmp_path: Path) -> None:
    """Both hold an a.png: a store on either root alone would take one for the other."""
    train = load(write(tmp_path / "train", {"image": "a.png"}))
    test = load(write(tmp_path / "test", {"image": "a.png"}))
    Image.new("L", (90, 30)).save(tmp_path / "test" / "a.png")
    train, test = share_root(train, test)
    assert train.image_root == test.image_root == tmp_path.resolve()
    store = ImageStore(tmp_path, 28 * 28 * 64, 28)
    (of_train,), (of_test,) = train.prompts[0].images, test.prompts[0].images
    assert store.load(of_train).width == store.load(of_train).height
    assert store.load(of_test).width > store.load(of_test).height


def test_a_split_that_is_a_link_can_share_a_root(tmp_path: Path) -> None:
    write(tmp_path / "far", MIXED[0])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(tmp_path / "far")
    train = load(tmp_path / "data" / "train" / "rows.jsonl")
    test = load(write(tmp_path / "data" / "test", MIXED[0]))
    for split in share_root(train, test):
        assert ImageStore(split.image_root, 28 * 28 * 64, 28).load(split.prompts[0].images[0])


def test_one_root_is_left_as_it_is(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, *MIXED))
    assert share_root(loaded, loaded)[0].prompts == loaded.prompts


def test_a_missing_path_names_its_neighbour(tmp_path: Path) -> None:
    path = write(tmp_path, *MIXED)
    (told,) = problems(path.with_name("row.jsonl"))
    assert "no such file or folder" in told
    assert "did you mean 'rows.jsonl'?" in told


def test_a_split_that_is_not_configured_is_told() -> None:
    with pytest.raises(UserError, match=r"data\.test is empty"):
        load_prompts(DataConfig(train="x"), "test")


def test_columns_are_refused_for_formats_that_have_none(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]", encoding="utf-8")
    config = DataConfig(train=str(tmp_path), columns={"id": "x"})
    with pytest.raises(UserError, match=r"data\.columns: is for jsonl and huggingface"):
        load_prompts(config, "train")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_an_empty_data_set(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    assert problems(path) == (f"data.train: no prompts in {path}",)


def test_loading_imports_nothing_heavy() -> None:
    code = (
        "import sys, medrl.data.load, medrl.data.images, medrl.data.schedule;"
        "heavy = {'torch', 'ray', 'vllm', 'deepspeed', 'transformers', 'datasets'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
