"""OmniMedVQA's quirks: each is read right, or told with file and row."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medrl.configs.errors import UserError
from medrl.configs.schema import DataConfig
from medrl.data.load import LoadedPrompts, load_prompts

RECORD: dict[str, Any] = {
    "dataset": "Lung Set",
    "question_id": "Lung Set_0000",
    "question_type": "Disease Diagnosis",
    "question": "What is seen?",
    "gt_answer": "COVID-19",
    "image_path": "Images/Lung Set/a.png",
    "option_A": "Normal",
    "option_B": "COVID-19",
    "option_C": "Pneumonia",
    "option_D": "Tuberculosis",
    "modality_type": "CT(Computed Tomography)",
}


def record(**changes: Any) -> dict[str, Any]:
    """RECORD with changes; None takes a key out."""
    return {key: value for key, value in {**RECORD, **changes}.items() if value is not None}


def write(root: Path, *records: Any, name: str = "Open-access/Lung Set.json") -> Path:
    file = root / "QA_information" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return file


def load(path: Path, images: bool = False, **config: Any) -> LoadedPrompts:
    return load_prompts(DataConfig(train=str(path), **config), "train", images=images)


def problems(path: Path, images: bool = False, **config: Any) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        load(path, images, **config)
    return caught.value.problems


def test_a_record_becomes_a_prompt_with_a_letter(tmp_path: Path) -> None:
    write(tmp_path, record())
    loaded = load(tmp_path)
    (prompt,) = loaded.prompts
    assert prompt.id == "Lung Set_0000"
    assert prompt.options == ("Normal", "COVID-19", "Pneumonia", "Tuberculosis")
    assert prompt.answer == "B"
    assert prompt.images == ("Images/Lung Set/a.png",)
    assert (prompt.modality, prompt.question_type) == ("CT", "Disease Diagnosis")
    assert prompt.source == "Lung Set"
    assert loaded.image_root == tmp_path


@pytest.mark.parametrize(
    "part", [".", "QA_information", "QA_information/Open-access/Lung Set.json"]
)
def test_image_paths_start_at_the_folder_that_holds_images(tmp_path: Path, part: str) -> None:
    write(tmp_path, record())
    assert load(tmp_path / part).image_root == tmp_path


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("CT(Computed Tomography)", "CT"),
        ("MR (Mag-netic Resonance Imaging)", "MRI"),
        ("X-Ray", "X-ray"),
        ("ultrasound", "Ultrasound"),
        ("Dermoscopy", "Dermoscopy"),
        ("Fundus Photography", "Fundus"),
        ("OCT (Optical Coherence Tomography", "OCT"),
        ("OCT (Optical Coherence Tomography)", "OCT"),
        ("Microscopy Images", "Microscopy"),
    ],
)
def test_modalities_as_written_have_one_name(tmp_path: Path, raw: str, name: str) -> None:
    write(tmp_path, record(modality_type=raw))
    loaded = load(tmp_path)
    assert loaded.prompts[0].modality == name
    assert loaded.notes == ()


def test_an_unknown_modality_is_kept_and_told(tmp_path: Path) -> None:
    write(tmp_path, record(modality_type="Endoscopy"))
    loaded = load(tmp_path)
    assert loaded.prompts[0].modality == "Endoscopy"
    assert loaded.notes == ("modalities kept as written: Endoscopy",)


def test_the_key_may_be_modality(tmp_path: Path) -> None:
    write(tmp_path, record(modality_type=None, modality="CT(Computed Tomography)"))
    assert load(tmp_path).prompts[0].modality == "CT"


@pytest.mark.parametrize("absent", ["missing", "null", "empty"])
def test_two_and_three_options_are_read(tmp_path: Path, absent: str) -> None:
    three, two = record(option_D=None), record(question_id="2", option_C=None, option_D=None)
    if absent != "missing":
        filler = None if absent == "null" else ""
        three["option_D"] = two["option_C"] = two["option_D"] = filler
    write(tmp_path, three, two)
    assert [len(prompt.options) for prompt in load(tmp_path).prompts] == [3, 2]


@pytest.mark.parametrize("gold", ["covid-19", "COVID-19.", " COVID-19 ", "Covid-19 ."])
def test_gold_may_differ_in_case_period_and_spaces(tmp_path: Path, gold: str) -> None:
    write(tmp_path, record(gt_answer=gold))
    assert load(tmp_path).prompts[0].answer == "B"


def test_duplicate_options_are_refused_only_where_they_are_the_answer(tmp_path: Path) -> None:
    write(tmp_path, record(option_C="Normal"), record(question_id="2", option_C="COVID-19"))
    (told,) = problems(tmp_path)
    assert "row 2" in told
    assert "options B and C" in told


def test_questions_without_their_images_are_left_out_where_they_may_not_be_passed_on(
    tmp_path: Path,
) -> None:
    path = "Images/Lung Set/a (1) [x] & b - Copy.png"
    (tmp_path / "Images/Lung Set").mkdir(parents=True)
    Image.new("L", (30, 30)).save(tmp_path / path)
    write(tmp_path, record(image_path=path))
    write(tmp_path, record(question_id="r"), name="Restricted-access/Other.json")
    loaded = load(tmp_path, images=True)
    assert [prompt.images for prompt in loaded.prompts] == [(path,)]
    (skipped,) = loaded.skipped
    assert "Restricted-access/Other.json: row 1: image" in skipped
    assert "does not exist" in skipped


def test_many_questions_on_one_image_are_fine(tmp_path: Path) -> None:
    write(tmp_path, record(), record(question_id="2"))
    assert len(load(tmp_path).prompts) == 2


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record(gt_answer="PET"), "gold 'PET' is not among the options A) Normal, B) COVID-19"),
        (record(option_B=None, option_C=None, option_D=None), "a single option ('Normal')"),
        (record(**{f"option_{letter}": letter for letter in "ABCDEFGHIJK"}), "11 options"),
        (record(gt_answer=None, gt_anwser="x"), "no key 'gt_answer'; did you mean 'gt_anwser'?"),
        (record(question=" "), "the question is empty"),
        (record(modality_type=None), "no key 'modality_type'"),
        (record(image_path="../a.png"), "leaves the image root"),
        (record(image_path="/etc/passwd"), "is absolute"),
        (record(question=["a"]), "question must be text, got list"),
        (record(question="half \ud800"), "surrogate"),
        ("a text", "must be a JSON object, got str"),
    ],
)
def test_a_bad_row_is_told_with_file_row_and_reason(tmp_path: Path, bad: Any, reason: str) -> None:
    file = write(tmp_path, record(question_id="good"), bad)
    (told,) = problems(tmp_path)
    assert told.startswith(f"{file}: row 2: ")
    assert reason in told


def test_a_duplicate_id_names_both_rows(tmp_path: Path) -> None:
    write(tmp_path, record())
    write(tmp_path, record(), name="Open-access/Other.json")
    (told,) = problems(tmp_path)
    assert "Other.json: row 1: id 'Lung Set_0000' is that of" in told
    assert "Lung Set.json: row 1" in told


def test_broken_json_is_told_with_line_and_column_and_other_files_are_read(
    tmp_path: Path,
) -> None:
    file = write(tmp_path, record(gt_answer="PET"))
    broken = file.with_name("Broken.json")
    broken.write_text('[\n {"dataset": "x",,}\n]', encoding="utf-8")
    file.with_name("Binary.json").write_bytes(b"\xff\xfe\x00")
    file.with_name("Object.json").write_text("{}", encoding="utf-8")
    told = problems(tmp_path)
    assert len(told) == 4
    assert any(f"{broken}: broken JSON at line 2, column 18" in one for one in told)
    assert any("is not UTF-8" in one for one in told)
    assert any("must hold a JSON list of rows, got dict" in one for one in told)


def test_the_first_twenty_problems_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    write(tmp_path, *(record(question_id=str(n), gt_answer="PET") for n in range(50)))
    told = problems(tmp_path)
    assert len(told) == 21
    assert told[-1] == "... and 30 more: 50 problems in all"


def test_a_folder_too_high_names_the_right_one(tmp_path: Path) -> None:
    write(tmp_path / "OmniMedVQA", record())
    (told,) = problems(tmp_path)
    assert f"give {tmp_path / 'OmniMedVQA'}" in told


def test_a_folder_without_records_says_what_it_needs(tmp_path: Path) -> None:
    (told,) = problems(tmp_path)
    assert "no .json file here: give the folder that holds QA_information and Images" in told


def test_twenty_thousand_rows_load_in_three_seconds(tmp_path: Path) -> None:
    for name in ("a", "b"):
        rows = [record(question_id=f"{name}{n}") for n in range(10_000)]
        write(tmp_path, *rows, name=f"{name}.json")
    start = time.process_time()
    assert len(load(tmp_path).prompts) == 20_000
    assert time.process_time() - start < 3
