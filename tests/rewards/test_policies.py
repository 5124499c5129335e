"""Policies: strict and lenient are in test_accuracy; here graded, and the released Med-R1 code."""

from __future__ import annotations

import random
import re
import time

import pytest

from medrl.configs.errors import UserError
from medrl.rewards.accuracy import graded
from medrl.rewards.check import check_rewards
from medrl.rewards.compose import PlainTerm, build_rewards
from medrl.rewards.medr1 import medr1_accuracy, medr1_form
from medrl.rewards.modes import MODES, NO_THINK, THINK_AFTER, THINK_BEFORE
from medrl.rewards.policies import POLICIES
from medrl.rewards.pool import RewardPool

BOTH = (PlainTerm("format"), PlainTerm("accuracy"))


@pytest.mark.parametrize(
    ("answer", "value", "outcome"),
    [
        *[(answer, 1.0, "ok") for answer in ("C", "c", " C ", "\nC\n")],
        *[(answer, 0.5, "ok") for answer in ("C.", "(C)", "C)", "C) CT", "Option C", "$C$")],
        *[(answer, 0.5, "ok") for answer in ("C) Ultrasound", "It is c, clearly")],
        *[(answer, 0.0, "wrong") for answer in ("A", "a)", "B. MRI", "E", "J")],
        *[(answer, 0.0, "unparsed") for answer in ("A or C", "C or C", "ABC", "CT", "Ultrasound")],
        *[(answer, 0.0, "unparsed") for answer in ("", "K", "С", "3", "C) a mass")],
    ],
)
def test_graded_is_a_whole_point_for_the_bare_letter_and_half_with_other_text(
    make_prompt, answer, value, outcome
):
    score = graded(NO_THINK, make_prompt("C"), f"<answer>{answer}</answer>")
    assert (score.total, score.outcome) == (value, outcome)


@pytest.mark.parametrize(
    "completion",
    ["C", "<answer>C", "<answer>C</answer><answer>C</answer>", "<think><answer>C</answer></think>"],
)
def test_graded_reads_the_only_answer_tag(make_prompt, completion):
    assert graded(THINK_BEFORE, make_prompt("C"), completion).outcome == "unparsed"


@pytest.mark.parametrize(
    ("gold", "answer", "value"),
    [("C", "C", 1.0), ("C", "(C)", 0.5), ("c", "C", 1.0), ("left lung", "Left lung.", 1.0)],
)
def test_graded_on_open_questions(make_prompt, gold, answer, value):
    prompt = make_prompt(gold, options=())
    assert graded(NO_THINK, prompt, f"<answer>{answer}</answer>").total == value


# What the released code was seen to do, gold `<answer> C </answer>`: completion, accuracy.
RELEASED_ACCURACY = [
    ("<answer>C</answer>", 1),
    ("<answer> C </answer>", 1),
    ("<think>why</think><answer>C</answer>", 1),
    ("C", 1),
    (" C\n", 1),
    ("<answer>c</answer>", 0),
    ("<answer>C)</answer>", 0),
    ("<answer>C.</answer>", 0),
    ("<answer>C) CT</answer>", 0),
    ("<answer>Option C</answer>", 0),
    ("<answer>$C$</answer>", 0),
    ("<answer>\nC\n</answer>", 0),
    ("<answer>A</answer> or <answer>C</answer>", 0),
    ("<answer>C</answer> <answer>A</answer>", 1),
    ("<answer>\nA</answer>\n<answer>C</answer>", 1),  # the first that closes on its line
    ("<think><answer>C</answer></think><answer>A</answer>", 1),
    ("<ANSWER>C</ANSWER>", 0),
    ("", 0),
]


@pytest.mark.parametrize(("completion", "accuracy"), RELEASED_ACCURACY)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_medr1_accuracy_is_the_released_one(make_prompt, mode, completion, accuracy):
    assert medr1_accuracy(mode, make_prompt("C"), completion).total == accuracy


@pytest.mark.parametrize(
    ("mode", "completion", "form"),
    [
        (THINK_BEFORE, "<think>why</think><answer>C</answer>", 1),
        (THINK_BEFORE, "<think>why</think>\n\n<answer>C</answer>", 1),
        (THINK_BEFORE, "<think>why\nand</think><answer>\nC\n</answer>", 1),
        (THINK_BEFORE, "<think>why</think><answer>C</answer>\n", 0),
        (THINK_BEFORE, " <think>why</think><answer>C</answer>", 0),
        (THINK_BEFORE, "<think></think><answer></answer>", 1),
        (THINK_BEFORE, "<think>why</think><answer>A</answer><answer>C</answer>", 1),
        (THINK_BEFORE, "<think>a</think><think>b</think><answer>C</answer>", 1),
        (THINK_BEFORE, "<think>why</think> so <answer>C</answer>", 0),
        (THINK_BEFORE, "<answer>C</answer><think>why</think>", 0),
        (THINK_BEFORE, "<answer>C</answer>", 0),
        (THINK_BEFORE, "C", 0),
        (NO_THINK, "<answer>C</answer>", 1),
        (NO_THINK, "\n <answer>C</answer>", 1),
        (NO_THINK, "<answer>C</answer>\n", 0),
        (NO_THINK, "<answer></answer>", 1),
        (NO_THINK, "<answer>anything </answer> junk </answer>", 1),
        (NO_THINK, "<answer>C</answer><think>why</think>", 0),
        (NO_THINK, "<think>why</think><answer>C</answer>", 0),
        (NO_THINK, "C", 0),
        (THINK_AFTER, "<answer>C</answer><think>why</think>", 0),
    ],
)
def test_medr1_form_is_the_released_one(mode, completion, form):
    assert medr1_form(mode, completion).total == form


def test_a_number_in_the_reasoning_earns_nothing_without_the_symbolic_path(make_prompt):
    """The one row that differs from the released code: there it is 1, and only for such golds."""
    prompt = make_prompt("2", options=())
    assert (
        medr1_accuracy(THINK_BEFORE, prompt, "<think>grade 2</think><answer>A</answer>").total == 0
    )


PIECES = ["<answer>", "</answer>", "<think>", "</think>", "C", "A", "\n", " ", "\u2028", "x", "<"]


def test_medr1_in_linear_time_finds_what_the_released_expressions_find(make_prompt):
    """The expressions are the released code's; ours must agree on every text."""
    rng, prompt = random.Random(3), make_prompt("C")
    expressions = {
        THINK_BEFORE: r"<think>.*?</think>\s*<answer>.*?</answer>",
        NO_THINK: r"\s*<answer>.*?</answer>",
    }
    seen = set()
    for _ in range(30_000):
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 9)))
        if rng.random() < 0.5:
            text = rng.choice(["<think>", "<answer>", ""]) + text + "</answer>"
        found = re.search(r"<answer>(.*?)</answer>", text)
        right = (found[1] if found else text).strip() == "C"
        assert medr1_accuracy(NO_THINK, prompt, text).total == right
        for mode, expression in expressions.items():
            form = bool(re.fullmatch(expression, text, re.DOTALL))
            assert medr1_form(mode, text).total == form
            seen.add((mode.name, right, form))
    assert len(seen) == 8  # every case was met


@pytest.mark.parametrize(
    "text", ["<answer>" * 2**17, "<think>" + "</think> " * 2**16 + "</answer>"]
)
def test_medr1_takes_linear_time(make_prompt, text):
    prompt, begin = make_prompt("C"), time.thread_time()
    for mode in MODES.values():
        medr1_accuracy(mode, prompt, text)
        medr1_form(mode, text)
    assert time.thread_time() - begin < 0.5


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", ["think-before", "no-think"])
def test_the_gold_answers_are_worth_all_points_under_every_policy(make_prompt, policy, mode):
    prompts = [make_prompt("C"), make_prompt("left lung", options=())]
    check_rewards(BOTH, mode, prompts, policy=policy)


def test_the_check_knows_the_policy(make_prompt):
    """The released code has no form for think-after, so its gold answers cannot pass."""
    with pytest.raises(UserError, match="format is 0, not 1"):
        check_rewards(BOTH, "think-after", [make_prompt("C")], policy="medr1")


@pytest.mark.parametrize(
    ("policy", "accuracy", "form"),
    [("strict", 1.0, 1.0), ("lenient", 1.0, 1.0), ("graded", 0.5, 1.0), ("medr1", 0.0, 0.0)],
)
def test_a_pool_scores_by_its_policy(make_prompt, policy, accuracy, form):
    completion = "<answer>(C)</answer>\n"
    with RewardPool(BOTH, "no-think", 1, 5.0, policy=policy) as pool:
        (score,) = pool.score_pairs([(make_prompt("C"), completion)])
    assert score.components == {"accuracy": accuracy, "format": form}
    assert score == build_rewards(BOTH, "no-think", policy=policy).score(
        make_prompt("C"), completion
    )
