"""Measured pass rates choose and order the training prompts, and a file that cannot is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders import make_prompt

from medrl.configs.errors import UserError
from medrl.configs.schema import DataConfig
from medrl.data.load import load_prompts
from medrl.data.pass_rates import Selected, select
from medrl.data.schedule import Schedule

RATES = {"a": 0.0, "b": 1.0, "e": 0.5, "d": 0.25, "c": 0.5}
PROMPTS = [make_prompt(name) for name in RATES]


def write(path: Path, rates: dict[str, float], **more: Any) -> str:
    lines = [json.dumps({"id": name, "pass_rate": rate, **more}) for name, rate in rates.items()]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def choose(path: str, **keys: Any) -> Selected:
    return select(DataConfig(train="x", pass_rates=path, **keys), PROMPTS)


def problems(path: str, **keys: Any) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        choose(path, **keys)
    return caught.value.problems


@pytest.mark.parametrize(
    ("keys", "left"),
    [
        ({}, "abedc"),
        ({"min_pass_rate": 0.25, "max_pass_rate": 0.5}, "edc"),
        ({"min_pass_rate": 0.01}, "bedc"),
        ({"max_pass_rate": 0.99}, "aedc"),
        ({"order": "easy_first"}, "bceda"),
        ({"order": "easy_first", "max_pass_rate": 0.5}, "ceda"),
    ],
)
def test_bounds_are_inclusive_and_the_easy_come_first(
    tmp_path: Path, keys: dict[str, Any], left: str
) -> None:
    """Ties go by id; without "easy_first" the order of the files stays."""
    path = write(tmp_path / "rates.jsonl", dict(reversed(RATES.items())))
    assert "".join(prompt.id for prompt in choose(path, **keys).prompts) == left


def test_what_was_left_out_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "rates.jsonl", RATES)
    (note,) = choose(path, min_pass_rate=0.3, max_pass_rate=0.9).notes
    assert "left out 3 of 5 training prompts" in note
    assert "1 never solved, 1 always, 1 between" in note
    assert choose(path).notes == ()


def test_rates_of_another_mode_are_warned_of(tmp_path: Path) -> None:
    path = write(tmp_path / "rates.jsonl", RATES, mode="think-before", instruction="")
    (note,) = choose(path).notes
    assert "data.mode 'think-before', now it is 'no-think'" in note
    assert choose(path, mode="think-before").notes == ()


def test_a_file_that_lacks_prompts_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rates.jsonl", {"a": 1.0, "c": 0.5, "of another set": 0.1})
    (problem,) = problems(path)
    assert "lacks 3 of 5 training prompts, first b" in problem


def test_bounds_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rates.jsonl", RATES)
    (problem,) = problems(path, min_pass_rate=0.6, max_pass_rate=0.9)
    assert "none of 5 training prompts" in problem
    assert "they have 0 to 1" in problem


def test_bad_lines_are_named_by_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rates.jsonl"
    path.write_text(
        '{"id": "a", "pass_rate": 0.5}\nnot JSON\n\n{"id": 3, "pass_rate": 0.5}\n'
        '{"id": "b", "pass_rate": 1.5}\n{"id": "b", "pass_rate": NaN}\n'
        '{"id": "c", "pass_rate": true}\n{"id": "a", "pass_rate": 0.5}\n[]\n{"id": "d", "pass'
    )
    found = problems(str(path))
    assert [f"line {n}:" in line for n, line in zip((2, 4, 5, 6, 7), found, strict=False)] == [
        True
    ] * 5
    assert found[-1] == "... and 3 more lines"
    assert "cannot be read" in problems(str(tmp_path / "gone.jsonl"))[0]


def test_only_training_prompts_are_chosen(tmp_path: Path) -> None:
    rows = [{"id": name, "question": "?", "options": ["x", "y"], "answer": "A"} for name in "abcde"]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(
        format="jsonl",
        train=str(data),
        test=str(data),
        pass_rates=write(tmp_path / "rates.jsonl", RATES),
        order="easy_first",
        min_pass_rate=0.25,
    )
    assert [prompt.id for prompt in load_prompts(config, "train").prompts] == list("bced")
    assert [prompt.id for prompt in load_prompts(config, "test").prompts] == list("abcde")


def test_an_order_is_the_same_every_epoch_and_for_every_draw() -> None:
    schedule = Schedule(3, seed=5, shuffled=False)
    assert [schedule[draw] for draw in (7, 0, 1, 2, 3, 4, 5)] == [1, 0, 1, 2, 0, 1, 2]
