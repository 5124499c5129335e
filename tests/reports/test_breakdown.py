"""An evaluation's numbers, against numbers counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders import make_group, make_prompt, make_score

from medrl.actors.types import Completion, Score, ScoredGroup
from medrl.configs.errors import RewardError
from medrl.reports.breakdown import summarize
from medrl.reports.intervals import paired_difference, wilson


def question(
    draw: int,
    right: bool,
    *,
    lenient: bool | None = None,
    form: bool = True,
    tokens: int = 4,
    cut: bool = False,
    **prompt: object,
) -> ScoredGroup:
    """A judged question; `lenient` accuracy is the strict one unless it is given."""
    completion = Completion(
        token_ids=(1,) * tokens,
        logprobs=(0.0,) * tokens,
        text="...",
        finish_reason="length" if cut else "stop",
        version=0,
    )
    group = make_group(draw, texts=("...",), prompt=make_prompt(f"p{draw}", **prompt))
    components = {
        "format": float(form),
        "accuracy": float(right),
        "lenient": float(right if lenient is None else lenient),
    }
    score = Score(components=components, total=0.0, outcome="ok" if right else "wrong")
    return ScoredGroup(
        group=replace(group, completions=(completion,)), scores=(score,), seconds=0.0
    )


FOUR = ("CT", "MR", "X-ray", "OCT")
GROUPS = [
    question(0, True, tokens=2),
    question(1, False, lenient=True, form=False, tokens=6, options=FOUR),
    question(2, False, tokens=16, cut=True, modality="MRI", options=FOUR),
    question(3, True, modality="MRI", question_type="Lesion", options=(), answer="nodule"),
    question(4, True, modality="MRI", question_type="Lesion", options=FOUR),
]


def test_every_number_of_a_row_is_as_counted_by_hand() -> None:
    rows = {(row["kind"], row["name"]): row for row in summarize(3, "test", GROUPS)["breakdown"]}
    assert list(rows) == [
        ("all", "all"),
        ("modality", "CT"),
        ("modality", "MRI"),
        ("question_type", "Lesion"),
        ("question_type", "Modality Recognition"),
    ]
    low, high = wilson(1, 2)
    assert rows["modality", "CT"] == {
        "kind": "modality",
        "name": "CT",
        "n": 2,
        "correct": 1,
        "accuracy": 0.5,
        "low": low,
        "high": high,
        "lenient": 1.0,
        "format": 0.5,
        "chance": (1 / 2 + 1 / 4) / 2,
        "tokens_per_completion": 4.0,
        "truncated": 0.0,
        "blind_n": 0,
        "blind": None,
    }
    assert rows["modality", "MRI"]["truncated"] == pytest.approx(1 / 3)
    assert rows["all", "all"]["tokens_per_completion"] == pytest.approx(32 / 5)
    # The open question has no chance level; the one with options beside it has.
    assert rows["question_type", "Lesion"]["chance"] == 0.25


def test_the_top_has_micro_and_macro_means_and_what_evals_jsonl_promises() -> None:
    found = summarize(3, "test", GROUPS)
    assert (found["step"], found["split"], found["n"]) == (3, "test", 5)
    assert (found["accuracy"], found["lenient"], found["format"]) == (0.6, 0.8, 0.8)
    assert (found["low"], found["high"]) == wilson(3, 5)
    assert found["by_modality"] == {"CT": 0.5, "MRI": pytest.approx(2 / 3)}
    assert found["n_by_question_type"] == {"Lesion": 2, "Modality Recognition": 3}
    assert found["macro_by_modality"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["macro_by_question_type"] == pytest.approx((1 + 1 / 3) / 2)
    assert found["blind"] is found["blind_difference"] is None


def test_open_questions_alone_have_no_chance_level() -> None:
    groups = [question(0, True, options=(), answer="lung")]
    found = summarize(0, "test", groups)
    assert found["chance"] is None
    assert (found["low"], found["high"]) == wilson(1, 1)
    assert found["macro_by_modality"] == found["macro_by_question_type"] == found["accuracy"] == 1


def test_the_blind_probe_is_compared_on_the_prompts_it_asked() -> None:
    """Prompts without an image are not asked again, and must not dilute the difference."""
    groups = [*GROUPS, question(5, True, modality="none", images=())]
    blind = [question(4, False, modality="MRI"), question(0, True), question(1, False)]
    found = summarize(0, "test", groups, blind)
    assert found["blind"] == pytest.approx(1 / 3)
    low, high = paired_difference(both=1, first=1, second=0, neither=1)
    difference = {"n": 3, "seeing": 2 / 3, "difference": 1 / 3, "low": low, "high": high}
    assert found["blind_difference"] == pytest.approx(difference)
    rows = {row["name"]: (row["blind_n"], row["blind"]) for row in found["breakdown"]}
    assert (rows["CT"], rows["MRI"], rows["none"]) == ((2, 0.5), (1, 0.0), (0, None))


@pytest.mark.parametrize("where", ["seeing", "blind"])
def test_a_failed_score_is_an_error(where: str) -> None:
    failed = replace(GROUPS[0], scores=(make_score(0.0, "error", "KeyError: 'x'"),))
    groups, blind = ([failed], []) if where == "seeing" else (GROUPS, [failed])
    with pytest.raises(RewardError, match=r"1 of \d completions.*KeyError"):
        summarize(0, "test", groups, blind)
