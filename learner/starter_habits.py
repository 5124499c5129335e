"""How the starter answers: the styles it knows, and the habits that reinforcement must undo.

Standard library only. A habit is a distribution over completions given a question, the same for
every picture with the same answer: noise laid over knowledge, not knowledge taken away.
"""

from __future__ import annotations

import random
from typing import Literal

from medrl.actors.types import LETTERS, Prompt
from medrl.rewards.modes import MODES, NO_THINK, Mode

Style = Literal["asked", "letter", "letter and text", "sentence", "text"]
STYLES: tuple[Style, ...] = ("asked", "letter", "letter and text", "sentence", "text")

FAVOURITE = "B"  # the letter it leans to where it is unsure, as zero-shot models lean to one
_OTHER_MODES = 0.2  # share of examples that ask in another mode than no-think

# Chance of the asked form, by the question's first word: obedience depends on the wording.
_OBEYS = {"What": 0.85, "How": 0.5, "Is": 0.5, "Does": 0.5, "Where": 0.5}
_OBEYS_ELSE = 0.12

# Chances of (the right letter, the favourite) before the rest is spread over all letters.
_SURE = (0.8, 0.0)
_UNSURE = (0.3, 0.55)
_SURE_MODALITIES = ("CT", "MRI", "X-ray", "Ultrasound")
_SURE_TYPES = ("Modality Recognition", "Anatomy Identification", "Other Biological Attributes")


def say(prompt: Prompt, letter: str, style: Style, mode: Mode) -> str:
    """Write the answer `letter` in a style. In the asked style its reasoning names the option."""
    text = prompt.options[LETTERS.index(letter)]
    if style == "asked":
        return mode.write(letter, f"The image shows {text}.")
    if style == "letter":
        return letter
    if style == "letter and text":
        return f"{letter}) {text}"
    return f"The answer is {letter}." if style == "sentence" else text


def knows(prompt: Prompt, rng: random.Random) -> tuple[Mode, str]:
    """A mode and a completion with the right answer, in any style."""
    mode = _mode(rng)
    style = "asked" if rng.random() < 0.5 else rng.choice(STYLES)
    return mode, say(prompt, prompt.answer, style, mode)


def tends(prompt: Prompt, rng: random.Random) -> tuple[Mode, str]:
    """A mode and a completion out of habit: often in another style, often wrong."""
    mode = _mode(rng)
    obeys = rng.random() < _OBEYS.get(prompt.question.split()[0], _OBEYS_ELSE)
    style = "asked" if obeys else rng.choices(STYLES[1:], weights=(4, 2, 3, 1))[0]
    return mode, say(prompt, _letter(prompt, rng), style, mode)


def is_sure(prompt: Prompt) -> bool:
    """Whether it answers such questions well out of habit."""
    seen = prompt.modality in _SURE_MODALITIES
    return seen and prompt.question_type in _SURE_TYPES


def _letter(prompt: Prompt, rng: random.Random) -> str:
    letters = LETTERS[: len(prompt.options)]
    right, favourite = _SURE if is_sure(prompt) else _UNSURE
    draw = rng.random()
    if draw < right:
        return prompt.answer
    return FAVOURITE if draw < right + favourite else rng.choice(letters)


def _mode(rng: random.Random) -> Mode:
    if rng.random() >= _OTHER_MODES:
        return NO_THINK
    return rng.choice([mode for mode in MODES.values() if mode is not NO_THINK])
