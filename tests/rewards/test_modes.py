"""A mode's words, form and reading agree with each other, and the form cannot be faked."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medrl.configs.errors import UserError
from medrl.configs.schema import RewardConfig
from medrl.rewards.check import check_rewards
from medrl.rewards.modes import (
    MODES,
    NO_THINK,
    THINK_AFTER,
    THINK_BEFORE,
    Mode,
    get_mode,
    odd_words,
)

BEFORE = "<think>why</think><answer>C</answer>"
AFTER = "<answer>C</answer><think>why</think>"
BARE = "<answer>C</answer>"


def test_the_user_turn_is_question_options_instruction(make_prompt):
    assert NO_THINK.render(make_prompt()).splitlines() == [
        "Which modality is this?",
        "A) CT",
        "B) MRI",
        "C) Ultrasound",
        "D) X-ray",
        "Answer with the letter inside <answer></answer>.",
    ]


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_an_open_question_is_not_asked_for_a_letter(make_prompt, mode):
    text = mode.render(make_prompt("pneumonia", options=()))
    assert "letter" not in text
    assert len(text.splitlines()) == 2


def test_an_unknown_mode_is_the_users_mistake():
    with pytest.raises(UserError, match="unknown mode 'think': choose one of think-before"):
        get_mode("think")


@pytest.mark.parametrize(
    ("mode", "completion"),
    [
        (THINK_BEFORE, BEFORE),
        (THINK_BEFORE, f" \n{BEFORE}\n"),
        (THINK_BEFORE, "<think>\nwhy\n\nso\n</think>\n\n<answer>\nC\n</answer>\n"),
        (NO_THINK, BARE),
        (NO_THINK, f"\n {BARE} \n"),
        (NO_THINK, "<answer>a < b and b > c</answer>"),
        (THINK_AFTER, AFTER),
        (THINK_AFTER, "<answer>C</answer>\n<think>why</think>"),
        (THINK_AFTER, "<answer>C</answer><think>超声</think>"),
    ],
)
def test_the_form_is_kept(mode, completion):
    assert mode.is_well_formed(completion) == (True, "")


@pytest.mark.parametrize(
    ("mode", "completion", "reason"),
    [
        (NO_THINK, "", "got none"),
        (NO_THINK, "C", "got none"),
        (NO_THINK, BEFORE, "needs the tags"),
        (NO_THINK, f"The answer: {BARE}", "text outside"),
        (NO_THINK, f"{BARE}!", "text outside"),
        (NO_THINK, f"{BARE}\u200b", "text outside"),
        (NO_THINK, "<answer></answer>", "nothing inside <answer>"),
        (NO_THINK, "<answer> \n </answer>", "nothing inside <answer>"),
        (NO_THINK, "<answer>\u200b</answer>", "nothing inside <answer>"),
        (NO_THINK, "<answer>C", "needs the tags"),
        (NO_THINK, "C</answer>", "needs the tags"),
        (NO_THINK, "</answer>C<answer>", "needs the tags"),
        (NO_THINK, "<answer>anything </answer> junk </answer>", "needs the tags"),
        (NO_THINK, BARE + BARE, "needs the tags"),
        (NO_THINK, "<answer><answer>C</answer></answer>", "needs the tags"),
        (NO_THINK, "<answer><think>why</think>C</answer>", "needs the tags"),
        (NO_THINK, "<answer>C <ANSWER>D</ANSWER></answer>", "needs the tags"),
        (NO_THINK, "<Answer>C</Answer>", "needs the tags"),
        (NO_THINK, "<answer >C</answer>", "needs the tags"),
        (NO_THINK, "<answer>C</answer x='1'>", "needs the tags"),
        (NO_THINK, "＜answer＞C＜/answer＞", "got none"),
        (THINK_BEFORE, "<think></think><answer></answer>", "nothing inside <think>"),
        (THINK_BEFORE, "<think>...</think><answer>C</answer>", "nothing inside <think>"),
        (THINK_BEFORE, "<think>why</think><answer>A</answer><answer>C</answer>", "needs the tags"),
        (THINK_BEFORE, "<think>a</think><think>b</think><answer>C</answer>", "needs the tags"),
        (THINK_BEFORE, "<think>a<think>b</think></think><answer>C</answer>", "needs the tags"),
        (THINK_BEFORE, "<think>a<answer>C</answer></think>", "needs the tags"),
        (THINK_BEFORE, "<think>a</think> so <answer>C</answer>", "text outside"),
        (THINK_BEFORE, AFTER, "needs the tags"),
        (THINK_BEFORE, BARE, "needs the tags"),
        (THINK_AFTER, BEFORE, "needs the tags"),
        (THINK_AFTER, BARE, "needs the tags"),
        (THINK_AFTER, "<answer>C</answer><think>cut o", "needs the tags"),
    ],
)
def test_the_form_is_broken_and_the_reason_is_said(mode, completion, reason):
    well_formed, said = mode.is_well_formed(completion)
    assert not well_formed
    assert reason in said


@pytest.mark.parametrize(
    ("completion", "text", "reason"),
    [
        (BARE, "C", ""),
        (BEFORE, "C", ""),
        (AFTER, "C", ""),
        (f"Well: {BARE}, I think", "C", ""),
        ("<answer>\n C \n</answer>", "C", ""),
        ("<answer>C</answer><think>cut o", "C", ""),
        ("", None, "no answer tag"),
        ("C", None, "no answer tag"),
        ("<answer>C", None, "not opened or not closed"),
        ("C</answer>", None, "not opened or not closed"),
        ("</answer>C<answer>", None, "not opened or not closed"),
        (BARE + BARE, None, "more than one"),
        ("<answer>A</answer> or <answer>C</answer>", None, "more than one"),
        ("<answer>A</answer><ANSWER>C</ANSWER>", None, "more than one"),
        ("<answer>A</answer> junk </answer>", None, "more than one"),
        ("<Answer>C</Answer>", None, "misspelled"),
        ("<answer></answer>", None, "empty"),
        ("<answer><think>x</think>C</answer>", None, "a tag inside"),
        ("<think>I say <answer>C</answer></think>", None, "inside the reasoning"),
        ("<think>cut off <answer>C</answer>", None, "inside the reasoning"),
        ("<think></think>" * 40 + BARE, None, "too many tags"),
    ],
)
def test_an_answer_is_read_from_the_only_answer_tag(completion, text, reason):
    for mode in MODES.values():
        answer = mode.read(completion)
        assert answer.text == text
        assert reason in answer.reason


@given(st.sampled_from(list(MODES.values())), st.from_regex(r"[a-zA-Z0-9 .,()\n]*[a-zA-Z0-9]\Z"))
def test_what_a_mode_writes_it_finds_well_formed_and_reads(mode, answer):
    completion = mode.write(answer, thought=answer)
    assert mode.is_well_formed(completion) == (True, "")
    assert mode.read(completion).text == answer.strip()


@given(st.sampled_from(list(MODES.values())), st.data())
def test_no_piece_can_be_dropped_from_or_doubled_in_a_form(mode, data):
    pieces = [part for block in mode.blocks for part in (f"<{block}>", "word", f"</{block}>")]
    place = data.draw(st.integers(0, len(pieces) - 1))
    dropped = [*pieces[:place], *pieces[place + 1 :]]
    assert not mode.is_well_formed("".join(dropped))[0]
    if pieces[place] != "word":
        doubled = [*pieces[:place], pieces[place], *pieces[place:]]
        assert not mode.is_well_formed("".join(doubled))[0]


def test_an_instruction_of_ones_own_replaces_the_last_line_alone(make_prompt):
    mode = get_mode("no-think", "Say {answer} {letter} {} {0} {{x}} in <answer>.")
    *others, last = mode.render(make_prompt()).splitlines()
    assert others == NO_THINK.render(make_prompt()).splitlines()[:-1]
    assert last == "Say letter {letter} {} {0} {{x}} in <answer>."
    assert mode.render(make_prompt("text", options=())).endswith(
        "Say answer {letter} {} {0} {{x}} in <answer>."
    )
    assert mode.write("C") == NO_THINK.write("C")
    assert get_mode("no-think").instruction == NO_THINK.instruction


def test_what_an_instruction_may_not_mean_is_told():
    odd = odd_words(get_mode("think-before", "Think, then {letter} in <answer></answer> {}."))
    assert len(odd) == 3
    assert "{letter} is sent as it stands" in odd[0] + odd[1]
    assert "does not name <think>" in odd[2]
    assert [odd_words(mode) for mode in MODES.values()] == [[], [], []]


FOURTH = """
from medrl.rewards.modes import Mode
WORDS = "<describe></describe> {answer} <answer></answer>"
DESCRIBE = Mode("describe", ("describe", "answer"), WORDS)
NUMBER = 3
"""


def test_a_fourth_mode_is_one_file_of_ones_own(tmp_path, monkeypatch, make_prompt):
    """Words, form, reading and rewards all follow, in a reward's process as well."""
    (tmp_path / "my_modes.py").write_text(FOURTH)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    mode = get_mode("my_modes:DESCRIBE")
    assert mode.render(make_prompt()).endswith("<describe></describe> letter <answer></answer>")
    assert mode.is_well_formed("<describe>round</describe><answer>C</answer>") == (True, "")
    assert not mode.is_well_formed(BARE)[0]
    assert not mode.is_well_formed("<describe>a<Describe></describe><answer>C</answer>")[0]
    assert mode.read("<describe>see <answer>C</answer></describe>").text is None
    check_rewards(RewardConfig().terms, "my_modes:DESCRIBE", [make_prompt("C")])
    for wrong in ("my_modes:NUMBER", "my_modes:GONE", "no_such_module:X", "my_modes:", "describe"):
        with pytest.raises(UserError, match="mode"):
            get_mode(wrong)


@pytest.mark.parametrize(
    "blocks", [("think",), ("answer", "answer"), ("Answer",), ("a b", "answer")]
)
def test_a_mode_has_plain_blocks_and_one_answer(blocks):
    with pytest.raises(ValueError, match="one of them answer"):
        Mode("odd", blocks, "")


MEBI = 2**20
ADVERSARIAL = {
    "angles": "<" * MEBI,
    "spaced angles": "< " * (MEBI // 2),
    "an angle and spaces": "<" + " " * MEBI,
    "slashes": "</" * (MEBI // 2),
    "tags": "<answer>" * (MEBI // 8),
    "closings": "</answer>" * (MEBI // 9),
    "tags that never end": "<answer" * (MEBI // 7),
    "one tag that never ends": "<answer" + " " * MEBI,
    "empty content": "<answer>" + " " * MEBI + "</answer>",
    "no content": "<answer>" + "." * MEBI + "</answer>",
    "long content": "<answer>" + "a " * (MEBI // 2) + "</answer>",
    "long thought": "<think>" + "<b>" * (MEBI // 3) + "</think><answer>C</answer>",
    "trailing space": "<answer>C</answer>" + " " * MEBI,
    "words": "answer think " * (MEBI // 13),
}


@pytest.mark.parametrize("text", ADVERSARIAL.values(), ids=ADVERSARIAL)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_mebibyte_is_read_in_linear_time(mode, text):
    """Sixteen times the text takes some sixteen times as long; squared, it would be 256 times."""
    middle = len(text) // 32
    part = text[:middle] + text[-middle:]  # with the beginning and the end, which make the form
    for read in (mode.read, mode.is_well_formed):
        assert _best_seconds(read, text) < 48 * _best_seconds(read, part) + 0.005


def _best_seconds(read, text):
    """Of five: the machine may be busy. Not of the wall: others' turns are not counted."""
    seconds = []
    for _ in range(5):
        begin = time.thread_time()
        read(text)
        seconds.append(time.thread_time() - begin)
    return min(seconds)
