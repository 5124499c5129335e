"""JSON lines with named columns: however options, gold and images are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medrl.actors.types import Prompt
from medrl.configs.errors import UserError
from medrl.configs.schema import DataConfig
from medrl.data.load import load_prompts

ROW: dict[str, Any] = {"question": "What is it?", "options": ["CT", "MRI"], "answer": "MRI"}


def load(folder: Path, *rows: Any, columns: dict[str, str] | None = None) -> tuple[Prompt, ...]:
    path = folder / "rows.jsonl"
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines), encoding="utf-8")
    config = DataConfig(format="jsonl", train=str(path), columns=columns or {})
    return load_prompts(config, "train", images=False).prompts


def problems(folder: Path, *rows: Any, columns: dict[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        load(folder, *rows, columns=columns)
    return caught.value.problems


def test_columns_of_our_names_need_no_mapping(tmp_path: Path) -> None:
    full = {
        **ROW,
        "id": 7,
        "image": "a.png",
        "modality": "OCT",
        "question_type": "Lesion Grading",
        "source": "ours",
    }
    (prompt,) = load(tmp_path, full)
    assert (prompt.id, prompt.images, prompt.answer) == ("7", ("a.png",), "B")
    assert (prompt.modality, prompt.question_type, prompt.source) == (
        "OCT", "Lesion Grading", "ours",
    )  # fmt: skip


def test_what_is_absent_has_a_plain_default(tmp_path: Path) -> None:
    first, second = load(tmp_path, ROW, ROW)
    assert (first.id, second.id) == ("rows/1", "rows/2")
    assert (first.modality, first.question_type, first.source) == ("unknown", "unknown", "rows")
    assert first.images == ()


def test_columns_of_other_names_are_mapped(tmp_path: Path) -> None:
    row = {"Q": "What?", "Choice A": "CT", "Choice B": "MRI", "label": "B", "figs": ["a", "b"]}
    columns = {
        "question": "Q",
        "option_A": "Choice A",
        "option_B": "Choice B",
        "answer": "label",
        "images": "figs",
    }
    (prompt,) = load(tmp_path, row, columns=columns)
    assert prompt.options == ("CT", "MRI")
    assert (prompt.answer, prompt.images) == ("B", ("a", "b"))


@pytest.mark.parametrize(
    "options",
    [
        ["CT", "MRI"],
        {"A": "CT", "B": "MRI"},
        {"B": "MRI", "A": "CT", "C": None},
        "['CT', 'MRI']",
        ["A: CT", "B: MRI"],
        ["(A) CT", "(B) MRI"],
        "{'a': 'CT', 'b': 'MRI'}",
    ],
)
@pytest.mark.parametrize("answer", ["B", "MRI", "mri.", 1])
def test_options_and_gold_are_read_in_every_way_they_are_written(
    tmp_path: Path, options: Any, answer: Any
) -> None:
    (prompt,) = load(tmp_path, {**ROW, "options": options, "answer": answer})
    assert prompt.options == ("CT", "MRI")
    assert prompt.answer == "B"


def test_options_that_only_look_labelled_are_kept(tmp_path: Path) -> None:
    (prompt,) = load(tmp_path, {**ROW, "options": ["A. baumannii", "E. coli"], "answer": "E. coli"})
    assert prompt.options == ("A. baumannii", "E. coli")


def test_a_question_without_options_is_open(tmp_path: Path) -> None:
    first, second = load(
        tmp_path,
        {"question": "How many?", "answer": 3},
        {"question": "Where?", "answer": "left", "options": []},
    )
    assert (first.options, first.answer) == ((), "3")
    assert (second.options, second.answer) == ((), "left")


def test_lines_may_hold_unicode_line_separators(tmp_path: Path) -> None:
    line = json.dumps({**ROW, "question": "one\u2028two"}, ensure_ascii=False)
    (prompt,) = load(tmp_path, line)
    assert prompt.question == "one\u2028two"


def test_missing_and_unknown_columns_are_told_with_the_nearest(tmp_path: Path) -> None:
    told = problems(
        tmp_path, {"Question": "x", "anser": "y"}, columns={"optoins": "x", "id": "Qestion"}
    )
    assert len(told) == 4
    assert "no field 'optoins'; did you mean 'options'?" in told[0]
    assert "no column 'Qestion' (data.columns.id); did you mean 'Question'?" in told[1]
    assert "no column 'question'; did you mean 'Question'?" in told[2]
    assert "no column 'answer'; did you mean 'anser'?" in told[3]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({**ROW, "answer": None}, "answer must be text, got null"),
        ({**ROW, "answer": "PET"}, "not among the options A) CT, B) MRI"),
        ({**ROW, "answer": 2}, "not among"),
        ({**ROW, "options": ["MRI"]}, "a single option"),
        ({**ROW, "options": [str(n) for n in range(11)], "answer": "3"}, "11 options"),
        ({**ROW, "options": {"A": "CT", "C": "MRI"}}, "lettered A, C, not A, B"),
        ({**ROW, "options": "CT or MRI"}, "options must be a list"),
        ({**ROW, "options": ["CT", ["MRI"]]}, "an option must be text, got list"),
        ({**ROW, "options": ["CT", ""]}, "an option is empty"),
        ({**ROW, "image": {"bytes": "x"}}, "an image must be a path, got dict"),
        ({**ROW, "image": "../a.png"}, "leaves the image root"),
        ('{"question": "x"', "broken JSON at column 17"),
        ("[1]", "must be a JSON object, got list"),
        ("[" * 100_000, "JSON that cannot be read"),
    ],
)
def test_a_bad_line_is_told_with_its_number(tmp_path: Path, bad: Any, reason: str) -> None:
    (told,) = problems(tmp_path, ROW, bad)
    assert told.startswith(f"{tmp_path / 'rows.jsonl'}: line 2: ")
    assert reason in told


def test_a_folder_of_files_is_read_whole(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(ROW), encoding="utf-8")
    config = DataConfig(format="jsonl", train=str(tmp_path))
    loaded = load_prompts(config, "train", images=False)
    assert [prompt.id for prompt in loaded.prompts] == ["a/1", "b/1"]
    assert loaded.image_root == tmp_path
