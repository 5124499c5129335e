"""Rewards by name and import path, their sum, and what a broken one does."""

from __future__ import annotations

import re

import pytest

from medrl.configs.errors import UserError
from medrl.configs.schema import RewardTerm
from medrl.rewards.check import check_rewards
from medrl.rewards.compose import build_rewards

RIGHT = "<answer>C</answer>"


def terms(*uses: str) -> tuple[RewardTerm, ...]:
    return tuple(RewardTerm(use=use) for use in uses)


def test_components_are_unweighted_and_the_total_is_their_weighted_sum(make_prompt):
    weighted = (
        RewardTerm(use="format", weight=0.5),
        RewardTerm(use="accuracy", weight=2.0),
        RewardTerm(use="hostile_rewards:length", weight=-0.1),
    )
    score = build_rewards(weighted, "no-think").score(make_prompt("C"), RIGHT)
    assert score.components == {"format": 1.0, "accuracy": 1.0, "length": 18.0}
    assert score.total == pytest.approx(0.5 + 2.0 - 1.8)
    assert (score.outcome, score.reason) == ("ok", "")


@pytest.mark.parametrize(
    ("completion", "outcome", "total"),
    [(RIGHT, "ok", 2), ("<answer>A</answer>", "wrong", 1), ("C", "unparsed", 0)],
)
def test_the_outcome_is_accuracys(make_prompt, completion, outcome, total):
    rewards = build_rewards(terms("format", "accuracy"), "no-think")
    score = rewards.score(make_prompt("C"), completion)
    assert (score.outcome, score.total) == (outcome, total)


def test_without_accuracy_the_outcome_is_ok(make_prompt):
    score = build_rewards(terms("format"), "no-think").score(make_prompt("C"), "junk")
    assert (score.outcome, score.total) == ("ok", 0.0)


def test_a_users_reward_may_return_a_score(make_prompt):
    rewards = build_rewards(terms("hostile_rewards:whole_score"), "no-think")
    score = rewards.score(make_prompt(), RIGHT)
    assert score.components == {"whole_score": 0.25}
    assert score.reason == "whole_score: a quarter"


@pytest.mark.parametrize(
    ("use", "completion", "reason"),
    [
        ("behave", "raise", "behave: LookupError: no such lesion"),
        ("behave", "sys_exit", "behave: SystemExit: no licence"),
        ("behave", "recurse", "behave: RecursionError: maximum recursion"),
        ("nothing", "", "nothing: TypeError: returned NoneType, needs a number or a Score"),
        ("text", "", "text: TypeError: returned str, needs a number"),
        ("not_a_number", "", "not_a_number: ValueError: returned nan"),
        ("gives_up", "", "gives_up: no mask for this image"),
    ],
)
def test_a_reward_that_fails_is_an_error_and_never_a_zero(make_prompt, use, completion, reason):
    rewards = build_rewards(terms("accuracy", f"hostile_rewards:{use}"), "no-think")
    score = rewards.score(make_prompt(), completion)
    assert score.failed
    assert (score.outcome, score.components) == ("error", {})
    assert score.reason.startswith(reason)


def test_a_sum_that_overflows_is_an_error(make_prompt):
    huge = (RewardTerm(use="hostile_rewards:length", weight=1e308),)
    score = build_rewards(huge, "no-think").score(make_prompt(), "x" * 100)
    assert score.outcome == "error"
    assert "inf" in score.reason


@pytest.mark.parametrize(
    ("uses", "problem"),
    [
        (["accurcy"], "unknown reward 'accurcy': use format, accuracy, yes_no"),
        (["my_lab."], "unknown reward 'my_lab.'"),
        ([":f"], "unknown reward ':f'"),
        (["nobodys_lab:f"], "nobodys_lab does not import: ModuleNotFoundError: No module named"),
        (["broken_rewards:f"], "No module named 'a_package_nobody_has'"),
        (["hostile_rewards:gone"], "module hostile_rewards has no gone"),
        (["hostile_rewards:NOT_A_FUNCTION"], "is a int, not callable"),
        (["hostile_rewards:one_argument"], "its signature is (completion: 'str') -> 'float'"),
        (["hostile_rewards:swapped"], "takes (prompt, completion), swapped"),
        (["hostile_rewards:later"], "is an async function"),
        (["accuracy", "accuracy"], "reward name 'accuracy' is used 2 times"),
        (["accuracy", "hostile_rewards:accuracy"], "'accuracy' is used 2 times: accuracy, hostile"),
        (["hostile_rewards:mean"], "a reward cannot be called 'mean'"),
        ([], "no rewards"),
    ],
)
def test_what_does_not_resolve_is_the_users_mistake(uses, problem):
    for resolve in (build_rewards, lambda terms, mode: check_rewards(terms, mode, [])):
        with pytest.raises(UserError, match=re.escape(problem)):
            resolve(terms(*uses), "no-think")


def test_all_problems_are_reported_at_once():
    with pytest.raises(UserError) as caught:
        build_rewards(terms("accurcy", "hostile_rewards:gone", "format", "format"), "no-think")
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("mode", ["think-before", "no-think", "think-after"])
def test_the_gold_answers_pass_the_check(make_prompt, mode):
    prompts = [make_prompt("C"), make_prompt("A", id="row-2"), make_prompt("a mass", options=())]
    check_rewards(terms("format", "accuracy", "hostile_rewards:length"), mode, prompts)


def test_the_check_names_reward_row_and_error(make_prompt):
    prompts = [make_prompt("A"), make_prompt("B", id="row-2"), make_prompt("B", id="row-3")]
    with pytest.raises(UserError) as caught:
        check_rewards(terms("accuracy", "hostile_rewards:spare_gold"), "no-think", prompts)
    assert len(caught.value.problems) == 2
    assert "row-2" in caught.value.problems[0]
    assert "spare_gold: KeyError: 'B'" in caught.value.problems[0]


def test_the_check_sees_a_gold_answer_that_accuracy_cannot_read(make_prompt):
    prompt = make_prompt("<answer>mass</answer>", options=())
    with pytest.raises(UserError, match="format is 0, not 1, accuracy is 0, not 1"):
        check_rewards(terms("format", "accuracy"), "no-think", [prompt])


def test_the_check_is_not_held_by_a_reward_that_hangs(make_prompt):
    prompt = make_prompt()
    with pytest.raises(UserError, match=r"row-1.*took longer than"):
        check_rewards(terms("hostile_rewards:always_spin"), "no-think", [prompt], timeout_s=0.3)
