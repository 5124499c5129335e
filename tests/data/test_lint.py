"""What lint counts and finds, whatever is wrong with a data set, and what is no data set at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medrl.configs.errors import UserError
from medrl.data import names
from medrl.data.detect import detect
from medrl.data.lint import LintReport, lint
from medrl.data.phantoms import generate
from medrl.data.survey import survey

CONTRACT = [
    "n", "by_modality", "by_question_type", "option_counts", "chance", "majority",
    "shared_images", "shared_questions", "problems",
]  # fmt: skip
FOUR = ["CT", "MRI", "OCT", "X-ray"]


def row(number: int, **cells: Any) -> dict[str, Any]:
    default = {
        "id": f"id{number}",
        "question": f"What is picture {number}?",
        "options": FOUR,
        "answer": "A",
        "image": f"{number}.png",
        "modality": "CT",
        "question_type": "Disease Diagnosis",
    }
    return {**default, **cells}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


def picture(path: Path, gray: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (60, 60), gray).save(path)


def report(path: Path, root: Path | None = None, against: Path | None = None) -> LintReport:
    return lint(survey(path, root), survey(against, root) if against else ())


def test_counts_chance_and_majority_are_those_counted_by_hand(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        row(1, answer="B"),
        row(2, answer="B", modality="MR"),
        row(3, options=["yes", "no"], answer="A", question_type="Lesion Grading"),
        row(4, options=None, answer="a cyst"),
    )
    found = report(path).to_json()
    assert list(found)[: len(CONTRACT)] == CONTRACT
    assert found["n"] == 4
    assert found["by_modality"] == {"CT": 3, "MRI": 1}
    assert found["by_question_type"] == {"Disease Diagnosis": 3, "Lesion Grading": 1}
    assert found["option_counts"] == {"4": 2, "2": 1, "0": 1}
    assert found["chance"] == pytest.approx((1 / 4 + 1 / 4 + 1 / 2) / 3)
    assert found["majority"] == pytest.approx(2 / 3)
    assert (found["shared_images"], found["problems"]) == (0, [])


def test_open_questions_alone_have_no_chance(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row(1, options=None, answer="a cyst"))
    assert report(path).total.chance is None
    assert report(path).total.majority is None


def test_images_are_shared_by_their_pixels_not_by_their_names(tmp_path: Path) -> None:
    """1.png lies in both folders and differs; 2.png is in the other under a name of its own."""
    write(tmp_path / "train" / "rows.jsonl", row(1), row(2), row(3, question="Same?"))
    write(
        tmp_path / "test" / "rows.jsonl",
        row(1, question="Other?"),
        row(2, image="copy.bmp", question="Same?"),
        row(3, image="copy.bmp"),
        row(4, question="Same?"),
    )
    for number in (1, 2, 3, 4):
        picture(tmp_path / "train" / f"{number}.png", 10 * number)
        picture(tmp_path / "test" / f"{number}.png", 100 + 10 * number)
    picture(tmp_path / "test" / "copy.bmp", 20)
    found = report(tmp_path).to_json()
    assert (found["shared_images"], found["test_prompts_of_shared_images"]) == (1, 2)
    # "Same?", and "What is picture 3?" is asked in the test set only: 3's question was replaced.
    assert (found["shared_questions"], found["test_prompts_of_shared_questions"]) == (1, 2)
    (told,) = found["problems"]
    assert "share 1 images: 2 of 4 prompts" in told
    assert found["splits"]["test"]["n"] == 4


def test_without_images_they_are_compared_by_path_and_that_is_said(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", row(1), row(2))
    write(tmp_path / "test.jsonl", row(2), row(3))
    found = report(tmp_path)
    assert found.leakage
    assert found.leakage.shared_images == 1
    assert sum("images not checked" in note for note in found.notes) == 2
    assert report(tmp_path / "train.jsonl", against=tmp_path / "test.jsonl").leakage


def test_against_looks_into_the_other_data_set(tmp_path: Path) -> None:
    one = write(tmp_path / "a" / "rows.jsonl", row(1), row(2))
    other = write(tmp_path / "b" / "rows.jsonl", row(2), row(3), row(4))
    found = report(one, against=other).to_json()
    assert (found["n"], found["shared_images"], found["shared_questions"]) == (2, 1, 1)


def test_all_problems_are_told_and_none_stops_the_others(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        row(1),
        row(2, answer="PET"),
        row(3, options=["CT", "ct.", "MRI"], answer="C"),
        row(1),
        row(5, image="../5.png"),
        row(6, image="empty.png"),
        row(7, image="gone.png"),
        row(8, image="text.png"),
        row(9, image="link.png"),
        {"question": "What?"},
    )
    picture(tmp_path / "1.png", 1)
    picture(tmp_path / "3.png", 3)
    picture(tmp_path.parent / "outside.png", 9)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "link.png").symlink_to(tmp_path.parent / "outside.png")
    found = report(path)
    assert found.total.n == 6
    for line, reason in (
        (2, "gold 'PET' is not among the options"),
        (3, "option 'CT' stands there 2 times"),
        (4, "id 'id1' is that of"),
        (5, "leaves the image root"),
        (6, "is empty (0 bytes)"),
        (7, "does not exist"),
        (8, "is not an image"),
        (9, "is a link to a file outside"),
        (10, "answer must be text, got null"),
    ):
        told = [sentence for sentence in found.problems if f"line {line}: " in sentence]
        assert any(reason in sentence for sentence in told), (line, reason, told)
    assert len(found.problems) == 9


def test_a_root_without_any_of_the_images_is_one_problem(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row(1), row(2))
    (tmp_path / "elsewhere").mkdir()
    (told,) = report(path, tmp_path / "elsewhere").problems
    assert "none of the 2 images is in" in told
    with pytest.raises(UserError, match="no such folder"):
        survey(path, tmp_path / "nowhere")


def test_unknown_modalities_types_and_sets_are_notes(tmp_path: Path) -> None:
    record = {
        "dataset": "Mura 2", "question_id": "1", "question_type": "Counting", "question": "What?",
        "gt_answer": "a", "image_path": "Images/a.png", "option_A": "a", "option_B": "b",
        "modality_type": "Endoscopy",
    }  # fmt: skip
    folder = tmp_path / "QA_information"
    folder.mkdir()
    (folder / "x.json").write_text(json.dumps([record, {**record, "question_id": "2"}]))
    found = report(tmp_path)
    assert not found.problems
    assert "modalities kept as written: Endoscopy" in found.notes
    assert "question types kept as written: Counting" in found.notes
    assert "none of OmniMedVQA's 42 sets: Mura 2" in found.notes


def test_the_42_sets_are_known_however_they_are_spelled() -> None:
    assert len(set(names.OMNIMEDVQA_SETS)) == 42
    assert names.is_omnimedvqa_set("oct & x-ray 2017")
    assert names.is_omnimedvqa_set("Chest CT Scan")
    assert not names.is_omnimedvqa_set("Chest CT")


def test_phantoms_have_no_problem(tmp_path: Path) -> None:
    generate(tmp_path / "set", train=8, test=8, seed=0, size=56, options="ordered")
    found = report(tmp_path / "set")
    assert not found.problems
    assert found.leakage
    assert found.leakage.shared_images == 0
    assert found.total.n == sum(counts.n for counts in found.splits.values()) == 80


def med_r1(folder: Path, *names_: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "image": "Images/a/1.png",
        "problem": "Q? A)x, B)y",
        "solution": "<answer> A </answer>",
    }
    for name in names_:
        (folder / name).write_text(json.dumps([record]))
    return folder


def test_med_r1s_folders_are_found_by_split_or_as_one(tmp_path: Path) -> None:
    splits = tmp_path / "Splits"
    for division in ("modality", "question_type"):
        med_r1(splits / division / "train", "X-Ray_train.json", "ultrasound_train.json")
        med_r1(splits / division / "test", "X-Ray_test.json")
    found = detect(splits / "modality")
    assert [(one.name, one.format, one.side) for one in found] == [
        ("train", "med_r1", "train"),
        ("test", "med_r1", "test"),
    ]
    assert report(splits / "modality").total.by_modality == {"Ultrasound": 1, "X-ray": 2}
    assert report(splits / "modality" / "test").total.n == 1
    with pytest.raises(UserError, match=r"give .*modality or .*question_type"):
        detect(splits)


def test_files_of_both_splits_in_one_folder_are_kept_apart(tmp_path: Path) -> None:
    found = report(med_r1(tmp_path, "X-Ray_train.json", "X-Ray_test.json"))
    assert {name: counts.n for name, counts in found.splits.items()} == {"train": 1, "test": 1}
    assert found.leakage
    assert found.leakage.shared_images == 1


def test_a_folder_of_test_files_is_one_split(tmp_path: Path) -> None:
    folder = med_r1(
        tmp_path, "Lesion Grading_test.json", "OCT (Optical Coherence Tomography_test.json"
    )
    (found,) = detect(folder)
    assert (found.name, found.side) == ("test", "test")
    assert report(folder).total.by_question_type == {"Lesion Grading": 1, "unknown": 1}


def test_hugging_face_sets_are_found_with_their_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setenv("MEDRL_CACHE", str(tmp_path / "cache"))
    rows = {
        "question": ["What?"],
        "options": [["x", "y"]],
        "answer": ["x"],
        "image": [Image.new("L", (56, 56), 9)],
    }
    one = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "both")
    one.save_to_disk(tmp_path / "one")
    one.to_parquet(tmp_path / "one.parquet")
    found = report(tmp_path / "both")
    assert found.leakage
    assert (found.total.n, found.leakage.shared_images) == (2, 1)
    for path in (tmp_path / "one", tmp_path / "one.parquet", Path(f"{tmp_path / 'both'}:test")):
        assert (report(path).total.n, report(path).problems) == (1, ())


@pytest.mark.parametrize("content", [None, "x.txt", "x.json"])
def test_what_is_no_data_set_is_refused(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / content).write_text('{"a": 1}')
    with pytest.raises(UserError, match="is no data set"):
        detect(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        detect(tmp_path / "gone")


def test_broken_and_empty_files_are_problems_of_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "CT_test.json").write_text('[{"image": "a", "problem": "Q? A)x, B)y"')
    assert "broken JSON" in report(tmp_path / "CT_test.json").problems[0]
    (tmp_path / "rows.jsonl").write_text("")
    assert "no prompts in it" in report(tmp_path / "rows.jsonl").problems[0]
    write(tmp_path / "columns.jsonl", {"Frage": "What?", "answer": "x"})
    assert "no column 'question'" in report(tmp_path / "columns.jsonl").problems[0]
