"""One answer is read as people write it; hedging, smuggling and disguises earn nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medrl.actors.types import LETTERS
from medrl.configs.errors import UserError
from medrl.rewards.accuracy import choose, lenient, strict
from medrl.rewards.modes import NO_THINK, THINK_BEFORE
from medrl.rewards.policies import POLICIES, get_policy

OPTIONS = ("CT", "MRI", "Ultrasound", "X-ray")


AS_PEOPLE_WRITE_IT = [
    *["C", "c", "(C)", "(c)", "C.", "C)", "C:", "C,", "C) Ultrasound", "C: Ultrasound"],
    *["C. ultrasound.", "C - Ultrasound", "C Ultrasound", "C\nUltrasound", "(C) Ultrasound"],
    *["Option C", "option c", "Choice C", "Answer: C", "Answer: (C) Ultrasound", "answer is C"],
    *["The answer is C.", "The correct answer is (C).", "Ultrasound", "ULTRASOUND.", "\tC\n"],
    *["$C$", "**C**", "**C)** Ultrasound", "`C`", '"C"', "[C]", "Answer: Ultrasound"],
]
HEDGES_DISGUISES_NOISE = [
    *["A or C", "A, C", "A/C", "A and C", "AC", "ABCD", "A B C D", "A-D", "(A)(C)", "A) CT C)"],
    *["A) CT B) MRI", "CT or MRI", "CT, MRI", "CT MRI Ultrasound X-ray", "C) Ultrasound and MRI"],
    *["any", "all", "", " ", "...", "$$", "()", "not C", "C?", "C!", "neither", "1", "3", "none"],
    *["С", "Ｃ", "ⅽ", "𝐂", "Ⓒ", "C\u200b", "\u200bC", "C\u0301", "C\x00", "C\ufeff", "&#67;"],
    *["\\boxed{C}", "<b>C</b>", "I think CT", "A CT scan", "options C", "C" * 500, "C " * 300],
    *["Ultrasound" + " " * 400 + "MRI", "Option", "Answer:", "the answer is", "Option Option C"],
    *["ultra sound", "A) Ultrasound CT", "C) C) C)"],
]


@pytest.mark.parametrize("answer", AS_PEOPLE_WRITE_IT)
def test_an_answer_is_read_as_people_write_it(answer):
    assert choose(answer, OPTIONS).letter == "C"


@pytest.mark.parametrize("answer", HEDGES_DISGUISES_NOISE)
def test_hedges_disguises_and_noise_are_not_read(answer):
    choice = choose(answer, OPTIONS)
    assert (choice.letter, choice.outcome) == ("", "unparsed")
    assert choice.reason


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("E", "letter E is beyond the 4 options"),
        ("(z)", "letter Z is beyond the 4 options"),
        ("E) MRI", "letter E is beyond the 4 options"),
        ("C) MRI", "letter C with the text of B"),
        ("Option A: Ultrasound", "letter A with the text of C"),
    ],
)
def test_a_contradiction_is_wrong_and_says_why(answer, reason):
    choice = choose(answer, OPTIONS)
    assert (choice.outcome, choice.reason) == ("wrong", reason)


@pytest.mark.parametrize(
    ("answer", "options", "letter"),
    [
        ("A", ("B", "A", "AB", "O"), "A"),  # blood groups: a lone letter is a letter
        ("AB", ("B", "A", "AB", "O"), "C"),
        ("O", ("B", "A", "AB", "O"), "D"),  # no such letter, so it is the text
        ("E", ("A", "E", "D", "K"), "B"),  # vitamins
        ("A lesion", ("A lesion", "No lesion"), "A"),
        ("A lesion", ("No lesion", "A lesion"), "B"),
        ("-5", ("-5", "5"), "A"),
        ("A) -5", ("-5", "5"), "A"),
        ("B) 5", ("-5", "5"), "B"),
        ("A) .5", (".5", "5"), "A"),
        ("t1a", ("T1a", "T1b"), "A"),
        ("T1a", ("T1A", "T1a"), "B"),  # only the exact one
        ("t1a", ("T1A", "T1a"), ""),  # either
        ("CT", ("CT", "CT"), ""),  # either
        ("Option A", ("Option B", "Option A"), "B"),
        ("B) CT", ("CT", "CT"), "B"),
        ("Crohn's disease", ("Crohn's disease", "Colitis"), "A"),
        ("cafe\u0301", ("café", "tea"), "A"),  # composed or not
        ("J", tuple("abcdefghij".upper()[::-1]), "J"),
    ],
)
def test_options_that_look_like_letters_or_each_other(answer, options, letter):
    assert choose(answer, options).letter == letter


# The released Med-R1 reward's behaviour, executed, beside ours. Gold is C of OPTIONS.
MED_R1 = [
    # completion, their accuracy, our accuracy, our outcome
    ("<answer>C</answer>", 1, 1, "ok"),
    ("<think>why</think><answer>C</answer>", 1, 1, "ok"),
    ("C", 1, 0, "unparsed"),
    ("<answer>c</answer>", 0, 1, "ok"),
    ("<answer>C)</answer>", 0, 1, "ok"),
    ("<answer>C.</answer>", 0, 1, "ok"),
    ("<answer>C) Ultrasound</answer>", 0, 1, "ok"),
    ("<answer>Option C</answer>", 0, 1, "ok"),
    ("<answer>$C$</answer>", 0, 1, "ok"),
    ("<answer>\nC\n</answer>", 0, 1, "ok"),
    ("<answer>A</answer> or <answer>C</answer>", 0, 0, "unparsed"),
    ("<answer>C</answer> <answer>A</answer>", 1, 0, "unparsed"),
]


@pytest.mark.parametrize(("completion", "theirs", "ours", "outcome"), MED_R1)
def test_each_known_defect_of_the_released_reward(make_prompt, completion, theirs, ours, outcome):
    score = strict(THINK_BEFORE, make_prompt("C"), completion)
    assert (score.total, score.outcome) == (ours, outcome)


def test_a_number_in_the_reasoning_is_not_an_answer(make_prompt):
    prompt = make_prompt("2", options=())
    score = strict(THINK_BEFORE, prompt, "<think>grade 2</think><answer>A</answer>")
    assert (score.total, score.outcome) == (0.0, "wrong")


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("Pneumonia", "pneumonia", True),
        ("  pneumonia. ", "Pneumonia", True),
        ("left  lung", "left lung", True),
        ("pneumonia or oedema", "pneumonia", False),
        ("2", "2", True),
        ("2.0", "2", False),
        ("C", "C", True),
        ("(C)", "C", True),
        ("C) CT", "C", True),
        ("Option C", "C", True),
        ("C) CT or B) MRI", "C", False),
        ("C or B", "C", False),
        ("B) C", "C", False),
        ("x" * 10_000, "pneumonia", False),
    ],
)
def test_an_open_answer_is_the_gold_text(make_prompt, answer, gold, right):
    score = strict(NO_THINK, make_prompt(gold, options=()), f"<answer>{answer}</answer>")
    assert score.outcome == ("ok" if right else "wrong")


@pytest.mark.parametrize(
    ("completion", "outcome"),
    [
        ("C", "ok"),
        ("The answer is C.", "ok"),
        ("Ultrasound", "ok"),
        ("<answer>A</answer> or <answer>C</answer>", "ok"),
        ("<answer>C</answer> <answer>A</answer>", "wrong"),
        ("<ANSWER>C</answer>", "ok"),
        ("<answer>C", "ok"),
        ("<think>A?</think>C", "ok"),
        ("It is bright.\nAnswer: C", "ok"),
        ("A or C", "unparsed"),
        ("<think>C</think>", "unparsed"),
        ("", "unparsed"),
    ],
)
def test_lenient_takes_the_last_tag_or_a_bare_answer(make_prompt, completion, outcome):
    assert lenient(THINK_BEFORE, make_prompt("C"), completion).outcome == outcome


def test_an_unknown_policy_is_the_users_mistake():
    with pytest.raises(UserError, match="unknown policy 'kind': choose one of strict, lenient"):
        get_policy("kind")


WORD = st.from_regex(r"[A-Za-z]{2,8}( [a-z]{2,8})?", fullmatch=True)
WAYS = ["{l}", "({l})", "{l}.", "{l}) {t}", "{l}: {t}", "Option {l}", "Answer: {l}", "{t}", "{t}."]


@given(st.lists(WORD, min_size=2, max_size=10, unique_by=str.casefold), st.data())
def test_every_way_of_writing_an_option_reads_as_that_option(options, data):
    number = data.draw(st.integers(0, len(options) - 1))
    letter = data.draw(st.sampled_from([LETTERS[number], LETTERS[number].lower()]))
    written = data.draw(st.sampled_from(WAYS)).format(l=letter, t=options[number])
    assert choose(written, tuple(options)).letter == LETTERS[number]


SCRAPS = st.sampled_from(
    [*"ABCDEabcd()., :-*$\n", *OPTIONS, " or ", " and ", "Option ", "Answer: "]
)


@given(st.one_of(st.text(max_size=40), st.lists(SCRAPS, max_size=8).map("".join)))
def test_no_answer_is_right_for_two_gold_answers(make_prompt, answer):
    """What a policy could gain by hedging: over all gold letters, at most one gives credit."""
    completion = f"<answer>{answer}</answer>"
    for policy in POLICIES.values():
        credits = [
            policy.accuracy(NO_THINK, make_prompt(gold), completion).total for gold in "ABCD"
        ]
        assert sum(credits) <= 1
