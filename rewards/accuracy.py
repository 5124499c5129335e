"""Is the answer right? 1 or 0 (graded: or 0.5), with how it came about.

An answer is read as people write one: `C`, `(C)`, `C.`, `C) CT`, `Option C`, `Answer: C`, or the
option's own words. At most one option is ever read, so naming several gains nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

from medrl.actors.types import LETTERS, Outcome, Prompt, Score
from medrl.rewards.modes import Mode

# These see `plain` text: lower case, single spaces. A dash parts only where a space follows: "-5".
_LEAD = re.compile(r"^(?:the )?(?:correct |final )?(?:answer|option|choice)(?: is)?(?: ?: ?| )")
_LETTER = re.compile(r"(?:\(([a-z])\)|([a-z])(?!\w))( ?[.:,)])? ?(?:[-–—] )?")
_LONE_LETTER = re.compile(r"\b[a-j]\b")
_ANY_CASE_LETTER = re.compile(r"\b[A-Ja-j]\b")
_LAST_ANSWER = re.compile(r"<\s*+answer\s*+>", re.IGNORECASE)
_WRAPPING = " *$`'\"“”‘’_[]{}"  # what markup and quoting put around an answer
_SLACK = 64  # characters an answer may have beyond an option's: "the correct answer is (C):"


@dataclass(frozen=True, slots=True)
class Choice:
    """Which option an answer names."""

    letter: str  # of LETTERS; "" where none was named
    outcome: Outcome  # ok: one option was named; wrong: it contradicts itself; or unparsed
    reason: str = ""


def plain(text: str) -> str:
    """Return a text without the differences that do not count: case, spaces, markup, full stop.

    Composed (NFC) but not folded: a Cyrillic or a full-width letter stays what it is.
    """
    text = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return text.lstrip(_WRAPPING).rstrip(_WRAPPING + ".")


def without_lead(plain_text: str) -> str:
    """Return a plain text without "the answer is", "option" and the like before it."""
    return _LEAD.sub("", plain_text).strip(_WRAPPING)


def option_of(text: str, options: Sequence[str]) -> str:
    """Return the letter of the only option with this text, else ""."""
    lettered = list(zip(LETTERS, options, strict=False))
    exact = [letter for letter, option in lettered if option == text]
    if len(exact) == 1:
        return exact[0]
    want = plain(text)
    loose = [letter for letter, option in lettered if want and plain(option) == want]
    return loose[0] if len(loose) == 1 else ""


def choose(answer: str, options: Sequence[str]) -> Choice:
    """Read which option an answer names. A lone letter is a letter, even where an option is "A"."""
    if len(answer) > max(map(len, options)) + _SLACK:
        return Choice("", "unparsed", "answer too long to be one option")
    whole = plain(answer)
    body = without_lead(whole)
    match = _LETTER.match(body)
    letter = (match[1] or match[2]).upper() if match else ""
    rest = plain(body[match.end() :]) if match else ""
    known = letter in tuple(LETTERS[: len(options)])
    text = option_of(answer, options)
    if known and not rest and (body == whole or not text):  # an option may be called "Option A"
        return Choice(letter, "ok")
    named = text or option_of(body, options)
    if named:
        return Choice(named, "ok")
    if not match:
        return Choice("", "unparsed", "neither a letter nor an option")
    if known and rest == plain(options[LETTERS.index(letter)]):
        return Choice(letter, "ok")
    other = option_of(rest, options)
    if not known and (other or not rest):
        return Choice("", "wrong", f"letter {letter} is beyond the {len(options)} options")
    if other:
        return Choice("", "wrong", f"letter {letter} with the text of {other}")
    return Choice("", "unparsed", f"more after the letter {letter} than its option's text")


def judge(answer: str, prompt: Prompt) -> Score:
    """Compare an answer, as it was written, with the gold one."""
    if not prompt.options:
        return replace(_judge_open(answer, prompt.answer), answer=answer)
    choice = choose(answer, prompt.options)
    if choice.outcome != "ok":
        return _score(choice.outcome, choice.reason, answer=answer)
    return _score("ok" if choice.letter == prompt.answer else "wrong", answer=choice.letter)


def _judge_open(answer: str, gold: str) -> Score:
    """Normalised equality; where the gold answer is a lone letter, letter forms count as well."""
    if len(answer) > 4 * len(gold) + _SLACK:
        return _score("wrong", "far longer than the gold answer")
    want, got = plain(gold), plain(answer)
    if answer == gold or (want and want == got):
        return _score("ok")
    match = _LETTER.match(without_lead(got)) if _LONE_LETTER.fullmatch(want) else None
    if match and (match[1] or match[2]) == want:
        rest = match.string[match.end() :]
        if not rest or ((match[1] or match[3]) and not _LONE_LETTER.search(rest)):
            return _score("ok")
    return _score("wrong")


def strict(mode: Mode, prompt: Prompt, completion: str) -> Score:
    """Judge the completion's only answer tag; nothing is taken from the reasoning."""
    answer = mode.read(completion)
    if answer.text is None:
        return _score("unparsed", answer.reason)
    return judge(answer.text, prompt)


def lenient(mode: Mode, prompt: Prompt, completion: str) -> Score:
    """Judge the last answer tag, else what follows the reasoning, else its last line.

    For scoring models that were never taught the tags. A policy trained on it learns to hedge.
    """
    start = -1
    for match in _LAST_ANSWER.finditer(completion):
        start = match.end()
    if start >= 0:
        return judge(completion[start:].split("</answer>", 1)[0].strip(), prompt)
    text = completion.rsplit("</think>", 1)[-1].strip()
    if not text:
        return _score("unparsed", "no answer")
    whole = judge(text, prompt)
    last_line = text[text.rfind("\n") + 1 :].strip()
    return whole if whole.outcome == "ok" or last_line == text else judge(last_line, prompt)


def graded(mode: Mode, prompt: Prompt, completion: str) -> Score:
    """MedVLM-R1's three grades: 1 for the letter alone in the answer tag, 0.5 for the letter with
    other text beside it, 0 where it is wrong or no letter or several stand there. Any case.

    Two differences from its code, neither of which a policy should learn. There, any of the
    characters A to J counts, inside words too, so that "Option C" (with its i) is 0 and "CT" is 0.5
    for C; here a letter stands alone. There, the first of several answer tags counts; here, as in
    `strict`, there is only one. A gold answer that is no letter is judged as in `strict`.
    """
    answer = mode.read(completion)
    if answer.text is None:
        return _score("unparsed", answer.reason)
    if not prompt.options and prompt.answer.upper() not in tuple(LETTERS):
        return judge(answer.text, prompt)
    letters = _ANY_CASE_LETTER.findall(answer.text)
    if len(letters) != 1:
        found = f"{len(letters) or 'no'} letters in the answer"
        return _score("unparsed", found, answer=answer.text)
    letter = letters[0].upper()
    if letter != prompt.answer.upper():
        return _score("wrong", answer=letter)
    if answer.text == letters[0]:
        return _score("ok", answer=letter)
    return _score("ok", "text beside the letter", 0.5, answer=letter)


def _score(outcome: Outcome, reason: str = "", right: float = 1.0, answer: str = "") -> Score:
    value = right if outcome == "ok" else 0.0
    return Score(
        components={"accuracy": value}, total=value, outcome=outcome, reason=reason, answer=answer
    )
