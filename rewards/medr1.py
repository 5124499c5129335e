"""Med-R1's released rewards, quirk for quirk: to reproduce its curves, not to train well.

Its accuracy tries symbolic equality (math-verify 0.5.2) before text. That path is left out: it
parses the gold `<answer> C </answer>` to nothing for every letter A to J, so that it cannot change
the score of a multiple-choice question (run on 3,000 random completions with four gold letters
each: no difference). Where the gold answer is a number it did, and gave credit for numbers in the
reasoning.

The regular expressions of that code take quadratic time on many unclosed tags; what stands here
finds the same in linear time, and a test compares the two.
"""

from __future__ import annotations

import re

from medrl.actors.types import Prompt, Score
from medrl.rewards.modes import NO_THINK, Mode

_OPEN, _CLOSE = "<answer>", "</answer>"
_BETWEEN = re.compile(r"</think>\s*+<answer>")
_LEADING = re.compile(r"\s*+<answer>")


def medr1_accuracy(mode: Mode, prompt: Prompt, completion: str) -> Score:
    """1 where the first answer tag that opens and closes on one line holds the gold letter exactly,
    or where there is none and the whole completion is the letter. No other writing of it counts.
    """
    want, _ = _read(f"{_OPEN} {prompt.answer} {_CLOSE}")
    got, tagged = _read(completion)
    if got == want:
        return Score(components={"accuracy": 1.0}, total=1.0, outcome="ok", answer=got)
    return Score(
        components={"accuracy": 0.0},
        total=0.0,
        outcome="wrong" if tagged else "unparsed",
        reason="" if tagged else "no answer tag on one line",
        answer=got if tagged else "",
    )


def medr1_form(mode: Mode, completion: str) -> Score:
    """1 where the released regular expression spans the completion: empty, doubled and nested
    blocks pass, a trailing line feed does not. It has none for think-after, where think-before's
    stands.
    """
    matches = _no_think(completion) if mode.blocks == NO_THINK.blocks else _think(completion)
    reason = "" if matches else f"not the released form of {mode.name}"
    value = float(matches)
    return Score(components={"format": value}, total=value, outcome="ok", reason=reason)


def _read(text: str) -> tuple[str, bool]:
    """First match of `<answer>(.*?)</answer>`, where "." is no line feed, else the whole text;
    stripped. And whether there was a match.
    """
    for line in text.split("\n"):
        start = line.find(_OPEN)
        end = line.find(_CLOSE, start + len(_OPEN)) if start >= 0 else -1
        if end >= 0:
            return line[start + len(_OPEN) : end].strip(), True
    return text.strip(), False


def _think(text: str) -> bool:
    r"""Full match of `<think>.*?</think>\s*<answer>.*?</answer>`, "." being any character."""
    if not (text.startswith("<think>") and text.endswith(_CLOSE)):
        return False
    return bool(_BETWEEN.search(text, len("<think>"), len(text) - len(_CLOSE)))


def _no_think(text: str) -> bool:
    r"""Full match of `\s*<answer>.*?</answer>`, "." being any character."""
    return text.endswith(_CLOSE) and bool(_LEADING.match(text, 0, len(text) - len(_CLOSE)))
