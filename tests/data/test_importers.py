"""Other medical data sets, in small files of their shapes, become prompts that are read back."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from medrl.actors.types import Prompt
from medrl.configs.errors import UserError
from medrl.configs.schema import DataConfig
from medrl.data.image_files import decode
from medrl.data.import_files import Imported, import_prompts
from medrl.data.lines import write_prompts
from medrl.data.load import load_prompts


def picture(gray: int) -> Image.Image:
    return Image.new("L", (60, 60), gray)


def table(images: dict[str, list[Any]], **columns: list[Any]) -> datasets.Dataset:
    made = datasets.Dataset.from_dict({**columns, **images})
    for name in images:
        made = made.cast_column(name, datasets.Image())
    return made


def run(name: str, source: Path | str, out: Path) -> Imported:
    """Import, write, read back the same."""
    read = import_prompts(name, str(source), out)
    write_prompts(out / "rows.jsonl", read.prompts)
    config = DataConfig(format="jsonl", train=str(out / "rows.jsonl"))
    assert load_prompts(config, "train", images=False).prompts == read.prompts
    return read


def good(name: str, source: Path | str, out: Path) -> tuple[Prompt, ...]:
    read = run(name, source, out)
    assert read.problems == ()
    return read.prompts


@pytest.mark.parametrize(("name", "title"), [("vqa_rad", "VQA-RAD"), ("path_vqa", "PathVQA")])
@pytest.mark.parametrize("how", ["file", "folder", "saved"])
def test_vqa_rad_and_path_vqa_hold_their_images_and_stay_open(
    tmp_path: Path, name: str, title: str, how: str
) -> None:
    made = table(
        {"image": [picture(10), picture(20), picture(10)]},
        question=["is there a mass?", "which organ?", "is it large?"],
        answer=["Yes", "the left lung", "no"],
    )
    folder = tmp_path / "set"
    folder.mkdir()
    source = {"file": folder / "train-00000-of-00001.parquet", "saved": f"{folder}:train"}
    if how == "saved":
        datasets.DatasetDict({"train": made, "test": made}).save_to_disk(folder)
    else:
        made.to_parquet(folder / "train-00000-of-00001.parquet")
    read = run(name, source.get(how, folder), tmp_path / "out")
    assert [p.answer for p in read.prompts] == ["Yes", "the left lung", "no"]
    assert {p.options for p in read.prompts} == {()}
    assert [p.question_type for p in read.prompts] == ["Yes/no", "Open", "Yes/no"]
    assert {p.source for p in read.prompts} == {title}
    assert len({p.id for p in read.prompts}) == 3
    assert read.holds_images
    (first,), (second,), (third,) = (p.images for p in read.prompts)
    assert first == third
    assert decode(tmp_path / "out" / second).getpixel((0, 0)) == (20, 20, 20)


def test_files_of_several_splits_are_not_mixed(tmp_path: Path) -> None:
    made = table({"image": [picture(1)]}, question=["what?"], answer=["no"])
    for split in ("train", "test"):
        made.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    with pytest.raises(UserError, match="holds files of test, train"):
        import_prompts("vqa_rad", str(tmp_path), tmp_path)


SLAKE = {
    "img_id": 1, "img_name": "xmlab1/source.jpg", "question": "What modality is this?",
    "answer": "MRI", "q_lang": "en", "qid": 7, "location": "Abdomen", "modality": "MRI",
    "answer_type": "OPEN", "base_type": "vqa", "content_type": "Modality", "triple": ["vhead"],
}  # fmt: skip


def test_slake_gives_one_language_at_a_time(tmp_path: Path) -> None:
    rows = [
        SLAKE,
        {**SLAKE, "qid": 8, "q_lang": "zh", "question": "这是什么模态?", "answer": "核磁共振"},
        {**SLAKE, "qid": 9, "modality": "X-Ray", "answer": "No", "answer_type": "CLOSED"},
    ]
    source = tmp_path / "train.json"
    source.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    read = run("slake", source, tmp_path)
    assert [(p.id, p.modality, p.answer, p.options) for p in read.prompts] == [
        ("slake/7", "MRI", "MRI", ()),
        ("slake/9", "X-ray", "No", ()),
    ]
    assert read.prompts[0].images == ("xmlab1/source.jpg",)
    assert read.prompts[0].question_type == "Modality"
    assert (read.left_out, read.holds_images) == (1, False)
    (chinese,) = good("slake_zh", source, tmp_path)
    assert (chinese.question, chinese.answer) == ("这是什么模态?", "核磁共振")


CHOICES = {
    "Choice A": " A:CT scan ", "Choice B": "B: MRI", "Choice C": "C: A: it is",
    "Choice D": "D:X-ray",
}  # fmt: skip


@pytest.mark.parametrize(
    "answer",
    [
        {"Answer": "MRI", "Answer_label": "B"},
        {"Anwser": "MRI", "Answer_label": "B"},
        {"Answer": "B:MRI", "Answer_label": "B", "index": "4", "Caption": "c", "split": "test"},
        {"Anwser": " mri. "},
        {"Answer": "B"},
    ],
)
def test_pmc_vqa_is_read_in_all_its_spellings(tmp_path: Path, answer: dict[str, str]) -> None:
    row = {"Figure_path": "PMC1_f (2).jpg", "Question": "Which, then?", **CHOICES, **answer}
    source = tmp_path / "test.csv"
    with source.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    (read,) = good("pmc_vqa", source, tmp_path)
    assert read.options == ("CT scan", "MRI", "A: it is", "X-ray")
    assert (read.answer, read.question) == ("B", "Which, then?")
    assert read.images == ("PMC1_f (2).jpg",)


def mmmu(subject: str, number: int, **cells: Any) -> dict[str, Any]:
    default = {
        "id": f"validation_{subject}_{number}",
        "question": "What do <image 1> and <image 2> show?",
        "options": "['a cyst', \"Crohn's disease\", '<image 2>']",
        "explanation": "",
        "answer": "B",
        "question_type": "multiple-choice",
    }
    return {**default, **cells}


def test_mmmu_gives_its_medical_subjects_with_several_images(tmp_path: Path) -> None:
    rows = [
        mmmu("Clinical_Medicine", 1),
        mmmu("Art_Theory", 1),
        mmmu("Public_Health", 2, answer="?"),
        mmmu("Pharmacy", 3, options="[]", answer="['2.5', '2.50']", question_type="open"),
        mmmu("Pharmacy", 4, options="[]", answer="a base", question_type="open"),
    ]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    images = {f"image_{n}": [picture(n) if n < 3 else None] * len(rows) for n in range(1, 8)}
    made = table(images, **columns)
    (tmp_path / "Clinical_Medicine").mkdir()
    made.to_parquet(tmp_path / "Clinical_Medicine" / "validation-00000-of-00001.parquet")
    read = run("mmmu", tmp_path, tmp_path / "out")
    choice, number, base = read.prompts
    assert read.left_out == 2
    assert choice.options == ("a cyst", "Crohn's disease", "<image 2>")
    assert (choice.answer, choice.question_type) == ("B", "Clinical Medicine")
    grays = [decode(tmp_path / "out" / path).getpixel((0, 0)) for path in choice.images]
    assert grays == [(1, 1, 1), (2, 2, 2)]
    assert (number.options, number.answer) == ((), "2.5")
    assert (base.options, base.answer) == ((), "a base")


def test_medxpertqa_gives_its_choices_once(tmp_path: Path) -> None:
    row = {
        "id": "MM-26",
        "question": "A man is seen.\nAnswer Choices: what?\nAnswer Choices: (A) Rest (B) Ice",
        "options": {"A": "Rest", "B": "Surgery", "C": "Ice", "D": "Heat", "E": "None"},
        "label": "E",
        "images": ["MM-26-a.jpeg", "MM-26-b.jpeg"],
        "medical_task": "Treatment",
        "body_system": "Skeletal",
        "question_type": "Reasoning",
    }
    source = tmp_path / "test.jsonl"
    source.write_text(json.dumps(row) + "\n")
    (read,) = good("medxpertqa", source, tmp_path)
    assert read.question == "A man is seen.\nAnswer Choices: what?"
    assert read.options == ("Rest", "Surgery", "Ice", "Heat", "None")
    assert (read.id, read.answer, read.question_type) == ("MM-26", "E", "Reasoning")
    assert read.images == ("MM-26-a.jpeg", "MM-26-b.jpeg")


def test_bad_rows_are_told_and_the_others_kept(tmp_path: Path) -> None:
    rows: list[Any] = [
        SLAKE,
        SLAKE,
        {**SLAKE, "qid": 2, "img_name": "../x.jpg"},
        {key: cell for key, cell in SLAKE.items() if key != "img_name"},
        {**SLAKE, "qid": 4, "answer": None},
        {**SLAKE, "qid": 5, "answer": " "},
        "row",
    ]
    source = tmp_path / "train.json"
    source.write_text(json.dumps(rows))
    read = run("slake", source, tmp_path)
    assert [prompt.id for prompt in read.prompts] == ["slake/7"]
    for number, reason in (
        (2, "id 'slake/7' is there already"),
        (3, "leaves the image root"),
        (4, "no key 'img_name'"),
        (5, "answer must be text, got null"),
        (6, "the answer is empty"),
        (7, "must be a JSON object"),
    ):
        assert any(f"row {number}: " in told and reason in told for told in read.problems), number
    assert len(read.problems) == 6


def test_a_gold_answer_that_is_no_choice_is_told(tmp_path: Path) -> None:
    source = tmp_path / "test.csv"
    head = ["Figure_path", "Question", "Answer", *CHOICES, "Answer_label"]
    lines = [
        ["a.jpg", "Q?", "PET", *CHOICES.values(), ""],
        ["a.jpg", "Q?", "", *CHOICES.values(), "E"],
        ["a.jpg", "Q?", "MRI"],
    ]
    with source.open("w", newline="") as file:
        csv.writer(file).writerows([head, *lines])
    read = import_prompts("pmc_vqa", str(source), tmp_path)
    assert read.prompts == ()
    for number, reason in ((1, "'PET' is not among"), (2, "'E' is not among"), (3, "got null")):
        assert any(f"row {number}: " in told and reason in told for told in read.problems), number


def test_a_missing_column_is_told_once_not_once_a_row(tmp_path: Path) -> None:
    rows = [{key: cell for key, cell in SLAKE.items() if key != "question"}] * 50
    source = tmp_path / "train.json"
    source.write_text(json.dumps(rows))
    (told,) = import_prompts("slake", str(source), tmp_path).problems
    assert "all 50 rows: no key 'question'" in told


def test_unknown_names_and_missing_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'slake'"):
        import_prompts("slak", str(tmp_path), tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        import_prompts("slake", str(tmp_path / "gone.json"), tmp_path)
