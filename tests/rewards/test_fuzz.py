"""A hundred thousand random completions: every policy and built-in reward scores each of them,
within its range, without an exception, in under a millisecond.
"""

from __future__ import annotations

import random
import time

import pytest

from medrl.actors.types import Score
from medrl.rewards.built_in import BUILT_IN, SHAPING, make_judge
from medrl.rewards.modes import MODES, NO_THINK
from medrl.rewards.policies import POLICIES

TAGS = ["<answer>", "</answer>", "<think>", "</think>", "<ANSWER>", "</ answer>", "<answer"]
LETTERS = [*"ABCDEc", "(C)", "C)", "CT", "MRI", " or ", ", ", "Option ", "$", "*"]
ODD = ["\n", " ", "\t", "\u200b", "\u2028", "С", "超声", "\ud800", "é", "🙂", "<b>", "&lt;", "\\"]
ODD += ["\0"]
OPEN = ["yes", "no", "left", "lung", "5", "-", ".", "1e9", "9" * 400, "[1,2,3,4]", "(1,2)", "["]
GOLD = {"yes_no": "yes", "numeric": "5", "text_match": "left lung", "token_f1": "left lung"}
GOLD["box_iou"] = "[1,2,3,4]"
N = 100_000


def completions(pieces):
    """Pieces in a row; every other one within answer tags, so that answers are often read."""
    rng = random.Random(7)
    for number in range(N):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 12 - 6 * (number % 2))))
        yield f"<answer>{text}</answer>" if number % 2 else text


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_scores_whatever_a_model_writes(make_prompt, name):
    policy, prompt, modes = POLICIES[name], make_prompt("C"), list(MODES.values())
    texts, credited, seconds = list(completions(TAGS + LETTERS + ODD)), 0, 0.0
    for number, text in enumerate(texts):
        mode = modes[number % 3]
        begin = time.thread_time()
        accuracy, form = policy.accuracy(mode, prompt, text), policy.form(mode, text)
        seconds += time.thread_time() - begin
        assert accuracy.total in ((0.0, 0.5, 1.0) if name == "graded" else (0.0, 1.0))
        assert form.total in (0.0, 1.0)
        assert (accuracy.total > 0) == (accuracy.outcome == "ok")
        credited += accuracy.outcome == "ok"
        if accuracy.outcome == "ok" and name in ("strict", "graded"):
            assert text.count("<answer>") == text.count("</answer>") == 1
    assert credited > 20  # the fuzz does reach right answers
    assert seconds / N < 1e-3


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_reward_scores_whatever_a_model_writes(make_prompt, name):
    # Lengths of the fuzz are some ten to a thousand characters.
    options = {"longest": 100, "margin": 50} if name == "length" else {}
    judge, prompt = make_judge(name, options), make_prompt(GOLD.get(name, "yes"), options=())
    low, high = (-1.0, 0.0) if name in SHAPING else (0.0, 1.0)
    texts, met, seconds = list(completions(TAGS + OPEN + ODD)), set(), 0.0
    for text in texts:
        begin = time.thread_time()
        result = judge(NO_THINK, prompt, text)
        seconds += time.thread_time() - begin
        value = result.total if isinstance(result, Score) else result
        assert low <= value <= high
        met.add(value)
    assert len(met) > 1  # the fuzz does reach other scores
    assert seconds / N < 1e-3


PIECES = ["1", "[", "[1 ", "(1,", "1,111", ". ", "yes ", "a", "\n", "é", " ", "[1,2,3,4] "]


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("piece", PIECES)
def test_a_long_completion_takes_linear_time(make_prompt, name, piece):
    """A quarter of a million characters, which a model might well repeat."""
    judge, prompt = make_judge(name, {}), make_prompt(GOLD.get(name, "yes"), options=())
    text = f"<answer>{piece * (2**18 // len(piece))}</answer>"
    begin = time.thread_time()
    judge(NO_THINK, prompt, text)
    assert time.thread_time() - begin < 1.0
