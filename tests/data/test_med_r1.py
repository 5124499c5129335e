"""Med-R1's split files: questions, options and answers out of one line of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medrl.actors.types import LETTERS, Prompt
from medrl.configs.errors import UserError
from medrl.configs.schema import DataConfig
from medrl.data.load import load_prompts
from medrl.data.med_r1 import split_problem
from medrl.data.rows import RowError

ROWS = [
    {
        "image": "Images/Retina Set (2)/a & b - Copy.jpg",
        "problem": "Which stage is seen, in your view? A)Stage Ia, B)Stage IIIb, C)Stage 0",
        "solution": "<answer> C </answer>",
    },
    {
        "image": "Images/Retina Set (2)/7.jpg",
        "problem": "What is this? A)Optical Coherence Tomography (OCT), B)X-ray",
        "solution": "<answer> A </answer>",
    },
]


def write(path: Path, rows: object) -> Path:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def load(path: Path, split: Any = "train") -> tuple[Prompt, ...]:
    config = DataConfig(format="med_r1", train=str(path), test=str(path))
    return load_prompts(config, split, images=False).prompts


def test_rows_become_prompts_named_by_their_file(tmp_path: Path) -> None:
    path = write(tmp_path / "Lesion Grading_test.json", ROWS)
    first, second = load(path)
    assert first.question == "Which stage is seen, in your view?"
    assert first.options == ("Stage Ia", "Stage IIIb", "Stage 0")
    assert (first.answer, second.answer) == ("C", "A")
    assert second.options == ("Optical Coherence Tomography (OCT)", "X-ray")
    assert first.images == ("Images/Retina Set (2)/a & b - Copy.jpg",)
    assert (first.question_type, first.modality) == ("Lesion Grading", "unknown")
    assert first.source == "Retina Set (2)"
    assert first.id != second.id


def test_modality_is_read_from_the_file_name_with_its_missing_bracket(tmp_path: Path) -> None:
    path = write(tmp_path / "OCT (Optical Coherence Tomography_test.json", ROWS)
    assert {(p.modality, p.question_type) for p in load(path)} == {("OCT", "unknown")}


def test_a_folder_of_both_splits_gives_each_its_own(tmp_path: Path) -> None:
    write(tmp_path / "X-Ray_train.json", ROWS)
    write(tmp_path / "ultrasound_train.json", ROWS)
    write(tmp_path / "X-Ray_test.json", ROWS[:1])
    assert len(load(tmp_path, "train")) == 4
    assert len(load(tmp_path, "test")) == 1


def test_a_folder_of_one_split_is_loaded_whole(tmp_path: Path) -> None:
    write(tmp_path / "X-Ray_test.json", ROWS)
    write(tmp_path / "ultrasound_test.json", ROWS)
    assert len(load(tmp_path, "train")) == 4


@pytest.mark.parametrize(
    ("problem", "question", "options"),
    [
        ("Q? A)x, y, and z, B)w", "Q?", ("x, y, and z", "w")),
        ("Q? A)type (A), B)type (B), C)none", "Q?", ("type (A)", "type (B)", "none")),
        ("Seen in panel A) or B)? A)lung, B)liver", "Seen in panel A) or B)?", ("lung", "liver")),
        ("Q? A)tumour (type A) of, B)cyst", "Q?", ("tumour (type A) of", "cyst")),
        ("Q? A)vitamins (A, B), B)none", "Q?", ("vitamins (A, B)", "none")),
        ("Is OCT (or the like here? A)yes, B)no", "Is OCT (or the like here?", ("yes", "no")),
        ("Q? A)OCT (Optical, B)CT", "Q?", ("OCT (Optical", "CT")),
        ("Q?\n A) x , B) y", "Q?", ("x", "y")),
        ("Q? A)It's good., B)it's bad.", "Q?", ("It's good.", "it's bad.")),
    ],
)
def test_options_with_commas_and_brackets_are_kept_whole(
    problem: str, question: str, options: tuple[str, ...]
) -> None:
    assert split_problem(problem) == (question, options)


texts = (
    st.text("abc ,().-1", min_size=1, max_size=20)
    .map(str.strip)
    .filter(
        lambda text: text and text.count("(") == text.count(")") and ")" not in text.split("(")[0]
    )
)


@given(texts, st.lists(texts, min_size=2, max_size=10))
def test_what_was_joined_is_split_again(question: str, options: list[str]) -> None:
    joined = ", ".join(f"{LETTERS[i]}){text}" for i, text in enumerate(options))
    assert split_problem(f"{question} {joined}") == (question, tuple(options))


@pytest.mark.parametrize("problem", ["What is this?", "Q? A)only", "Q? A), B)x", ""])
def test_a_problem_without_two_options_is_refused(problem: str) -> None:
    with pytest.raises(RowError, match="fewer than two options"):
        split_problem(problem)


def test_every_bad_row_is_told_with_file_and_row(tmp_path: Path) -> None:
    rows = [
        ROWS[0],
        {**ROWS[0], "solution": "<answer> D </answer>"},
        {"image": "a.png", "problm": "Q? A)x, B)y", "solution": "A"},
        {**ROWS[0], "problem": "Q?"},
        "row",
        {**ROWS[0], "image": "../secret.png"},
    ]
    path = write(tmp_path / "CT_test.json", rows)
    with pytest.raises(UserError) as caught:
        load(path)
    told = caught.value.problems
    assert [sentence.split(": ")[1] for sentence in told] == [
        "row 3", "row 4", "row 5", "row 2", "row 6",
    ]  # fmt: skip
    assert "'problm'" in told[0]
    assert "'D' is not among the options A) Stage Ia" in told[3]
    assert "leaves the image root" in told[4]
