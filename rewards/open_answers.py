"""Rewards for open questions, in [0, 1]: yes/no, a number, a text, its words.

Each reads the only answer tag, as strict accuracy does, and compares it with the gold answer; where
no answer can be read, or one that hedges, or the gold answer is not of the kind, it is 0.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

from medrl.actors.types import Prompt, Score
from medrl.rewards.accuracy import plain, without_lead
from medrl.rewards.modes import Mode

_YES_NO = re.compile(r"\b(?:yes|no)\b")
# No part of a word ("T1"); a comma only between thousands, so that "0,5" is two numbers and unread.
_NUMBER = re.compile(
    r"(?<!\w)[-+−]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]++)(?:\.[0-9]++)?|\.[0-9]++)"
    r"(?:e[-+]?[0-9]++(?!\w))?"
)
_CJK = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(f"[{_CJK}]|[^\\W{_CJK}]+")
_ARTICLES = ("a", "an", "the")
_ROUNDING = 1e-12  # relative: 1.1 is within 0.1 of 1.0, which binary fractions deny


def nothing(reason: str) -> Score:
    """Return a 0 that says why."""
    return Score(components={}, total=0.0, outcome="unparsed", reason=reason)


def words(text: str) -> list[str]:
    """Return a text's words in lower case; Chinese and Japanese ones by character."""
    return _WORD.findall(unicodedata.normalize("NFC", text).casefold())


@dataclass(frozen=True, slots=True)
class YesNo:
    """1 where the answer begins with the gold yes or no and nowhere says the other."""

    def __call__(self, mode: Mode, prompt: Prompt, completion: str) -> float | Score:
        answer = mode.read(completion)
        if answer.text is None:
            return nothing(answer.reason)
        want, got = _side(prompt.answer), _side(answer.text)
        if not want:
            return nothing("the gold answer is neither yes nor no")
        return float(got == want) if got else nothing("neither yes nor no, or both")


def _side(text: str) -> str:
    body = without_lead(plain(text))
    said = set(_YES_NO.findall(body))
    return said.pop() if len(said) == 1 and _YES_NO.match(body) else ""


@dataclass(frozen=True, slots=True)
class Numeric:
    """1 where the answer's only number is near the gold one: by at most `tolerance`, or by at most
    `relative` times the gold one. Units and percent signs are not compared.
    """

    tolerance: float = 0.0
    relative: float = 0.0

    def __post_init__(self) -> None:
        if self.tolerance < 0 or self.relative < 0:
            raise ValueError("tolerance and relative need to be 0 or more")

    def __call__(self, mode: Mode, prompt: Prompt, completion: str) -> float | Score:
        answer = mode.read(completion)
        if answer.text is None:
            return nothing(answer.reason)
        want, got = _number(prompt.answer), _number(answer.text)
        if want is None:
            return nothing("the gold answer has no number, or several")
        if got is None:
            return nothing("no number, or several")
        limit = max(self.tolerance, self.relative * abs(want))
        return float(abs(got - want) <= limit + _ROUNDING * max(abs(got), abs(want)))


def _number(text: str) -> float | None:
    """Return the only number of a text, else None."""
    found = _NUMBER.findall(text.casefold())
    if len(found) != 1:
        return None
    number = float(found[0].replace(",", "").replace("−", "-"))
    return number if math.isfinite(number) else None


@dataclass(frozen=True, slots=True)
class TextMatch:
    """1 where the answer is the gold text, but for case, white space, markup and a full stop."""

    def __call__(self, mode: Mode, prompt: Prompt, completion: str) -> float | Score:
        answer = mode.read(completion)
        if answer.text is None:
            return nothing(answer.reason)
        want = plain(prompt.answer)
        return float(answer.text == prompt.answer or (want != "" and plain(answer.text) == want))


@dataclass(frozen=True, slots=True)
class TokenF1:
    """F1 of the answer's words against the gold ones, repeats counted, articles left out."""

    def __call__(self, mode: Mode, prompt: Prompt, completion: str) -> float | Score:
        answer = mode.read(completion)
        if answer.text is None:
            return nothing(answer.reason)
        want, got = _bag(prompt.answer), _bag(answer.text)
        shared = (want & got).total()
        return 2 * shared / (want.total() + got.total()) if shared else 0.0


def _bag(text: str) -> Counter[str]:
    """Count the words; articles only where there is nothing else."""
    every = words(text)
    return Counter([word for word in every if word not in _ARTICLES] or every)
