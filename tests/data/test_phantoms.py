"""Phantoms: the same arguments give the same bytes, and no answer is known without looking."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medrl.configs.schema import DataConfig
from medrl.data.load import load_prompts
from medrl.data.phantom_draw import draw
from medrl.data.phantom_scene import MODALITIES, Scene, deal
from medrl.data.phantoms import QUESTION_TYPES, RAW_MODALITIES, Phantoms, generate


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Phantoms:
    return generate(tmp_path_factory.mktemp("phantoms"), train=128, test=96, seed=3)


def records(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "QA_information" / "Open-access").glob("*.json"))
    return [record for file in files for record in json.loads(file.read_text())]


def options(record: dict[str, Any]) -> list[str]:
    return [record[key] for key in sorted(record) if key.startswith("option_")]


def digests(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        generate(tmp_path / name, train=16, test=8, seed=seed)
    one, same, other = (digests(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same
    assert one.keys() == other.keys()
    assert not set(one.values()) & set(other.values())


@pytest.mark.parametrize(("train", "test"), [(128, 96), (32, 32)])
def test_train_and_test_have_no_image_in_common(tmp_path: Path, train: int, test: int) -> None:
    """Also where both are of one size, and so would be dealt the same scenes by the same dice."""
    made = generate(tmp_path, train=train, test=test, seed=3)
    pixels = [
        {hashlib.sha256(Image.open(path).tobytes()).hexdigest() for path in split.rglob("*.png")}
        for split in (made.train, made.test)
    ]
    assert [len(split) for split in pixels] == [train, test]  # nor twice in one split
    assert not pixels[0] & pixels[1]


def test_records_are_omnimedvqas(phantoms: Phantoms) -> None:
    """Its keys, its raw modality strings, a text as gold answer, one file a data set."""
    for record in records(phantoms.train):
        shown = options(record)
        letters = {f"option_{letter}" for letter in "ABCD"[: len(shown)]}
        fixed = {"dataset", "question_id", "question_type", "question", "gt_answer"}
        assert set(record) == fixed | {"image_path", "modality_type"} | letters
        assert shown.count(record["gt_answer"]) == 1
        assert len(set(shown)) == len(shown)
        assert record["modality_type"] in RAW_MODALITIES.values()
        assert record["image_path"].startswith(f"Images/{record['dataset']}/")
        assert (phantoms.train / record["image_path"]).is_file()
    ids = [record["question_id"] for record in records(phantoms.train)]
    assert len(set(ids)) == len(ids) == phantoms.train_questions


def test_the_reader_of_omnimedvqa_loads_them(phantoms: Phantoms) -> None:
    config = DataConfig(train=str(phantoms.train), test=str(phantoms.test))
    loaded = load_prompts(config, "test")
    assert len(loaded.prompts) == phantoms.test_questions == 480
    assert not loaded.skipped
    assert not loaded.notes  # all modalities are known ones
    gold = {record["question_id"]: record["gt_answer"] for record in records(phantoms.test)}
    for prompt in loaded.prompts:
        assert prompt.options["ABCD".index(prompt.answer)] == gold[prompt.id]


def test_every_modality_is_asked_every_type_equally_often(phantoms: Phantoms) -> None:
    counts = Counter((r["modality_type"], r["question_type"]) for r in records(phantoms.test))
    assert counts == {
        (modality, question_type): 12
        for modality in RAW_MODALITIES.values()
        for question_type in QUESTION_TYPES
    }


def test_no_letter_is_worth_guessing(tmp_path: Path) -> None:
    """Overall, and knowing question and options: the majority answer is near chance."""
    asked = records(generate(tmp_path, train=768, test=8, seed=0, size=28).train)
    letters = Counter("ABCD"[options(r).index(r["gt_answer"])] for r in asked)
    assert max(letters.values()) < 0.30 * len(asked)
    by_options: dict[tuple[str, ...], Counter[str]] = {}
    for record in asked:
        by_options.setdefault(tuple(options(record)), Counter())[record["gt_answer"]] += 1
    for shown, answers in by_options.items():
        assert max(answers.values()) < 1.35 * answers.total() / len(shown), shown


def test_there_are_two_to_four_options_and_several_wordings(phantoms: Phantoms) -> None:
    asked = records(phantoms.train)
    assert {len(options(record)) for record in asked} == {2, 4}
    wordings = {kind: set() for kind in QUESTION_TYPES}  # type: dict[str, set[str]]
    for record in asked:
        wordings[record["question_type"]].add(record["question"])
    assert min(map(len, wordings.values())) >= 3


def test_ordered_options_stand_still_and_shuffled_ones_move(tmp_path: Path) -> None:
    def orders(name: str, **how: Any) -> dict[tuple[str, ...], set[tuple[str, ...]]]:
        found: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
        for record in records(generate(tmp_path / name, train=64, test=8, seed=0, **how).train):
            shown = tuple(options(record))
            found.setdefault(tuple(sorted(shown)), set()).add(shown)
        return found

    assert all(len(seen) == 1 for seen in orders("ordered").values())
    assert all(len(seen) > 1 for seen in orders("shuffled", options="shuffled").values())


def test_a_picture_shows_its_scene() -> None:
    """Lesions, and nothing else, change when only the lesions do; and on the side they are on."""
    for modality in MODALITIES:
        pictures = {}
        for lesions, side in ((0, "Left"), (2, "Left"), (2, "Right")):
            scene = Scene(
                modality=modality,
                shape="Round",
                large=True,
                lesions=lesions,
                kind="Nodule" if lesions else "None",
                side=side,  # type: ignore[arg-type]
            )
            # Same noise, but for the draws the lesions themselves take: means hide those.
            pictures[lesions, side] = draw(scene, np.random.default_rng(5)).astype(float)
        for side, column in (("Left", 0), ("Right", 1)):
            change = (pictures[2, side] - pictures[0, "Left"]).mean(axis=(0, 2))
            halves = [change[:42].sum(), change[42:].sum()]
            assert np.argmax(np.abs(halves)) == column, (modality, side)


def test_deal_balances_every_factor_within_a_modality() -> None:
    scenes = [s for s in deal(8 * 48, random.Random(0)) if s.modality == "OCT"]
    for factor, values in (("shape", 4), ("large", 2), ("lesions", 4), ("side", 4)):
        counts = Counter(getattr(scene, factor) for scene in scenes)
        assert set(counts.values()) == {48 // values}, factor
    kinds = Counter(scene.kind for scene in scenes)
    assert set(kinds.values()) == {12}


def test_a_scene_without_lesions_has_no_kind() -> None:
    with pytest.raises(ValueError, match="0 lesion"):
        Scene(modality="CT", shape="Round", large=True, lesions=0, kind="Cyst", side="Left")


def test_size_is_the_pictures_size(tmp_path: Path) -> None:
    made = generate(tmp_path, train=8, test=8, seed=0, size=56)
    assert {Image.open(path).size for path in made.train.rglob("*.png")} == {(56, 56)}
