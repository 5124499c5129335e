"""The rewards that a config names by a plain word, besides `format` and `accuracy`.

Each is a frozen dataclass: its fields are the term's `options`, with their defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from medrl.actors.types import Prompt, Score
from medrl.configs.errors import UserError
from medrl.rewards.boxes import BoxIou
from medrl.rewards.modes import Mode
from medrl.rewards.open_answers import Numeric, TextMatch, TokenF1, YesNo
from medrl.rewards.shaping import Length, Repetition

Judge = Callable[[Mode, Prompt, str], float | Score]

ANSWERS: dict[str, Callable[..., Judge]] = {
    "yes_no": YesNo,
    "numeric": Numeric,
    "text_match": TextMatch,
    "token_f1": TokenF1,
    "box_iou": BoxIou,
}
"""In [0, 1]; the gold answer itself is worth 1."""

SHAPING: dict[str, Callable[..., Judge]] = {"length": Length, "repetition": Repetition}
"""In [-1, 0]."""

BUILT_IN = ANSWERS | SHAPING

_LARGEST = 1e12  # option


def make_judge(name: str, options: Mapping[str, Any]) -> Judge:
    """Return the reward `name` of BUILT_IN with its options. Raises UserError with all problems."""
    maker: Any = BUILT_IN[name]
    defaults = {field.name: field.default for field in fields(maker)}
    known = ", ".join(defaults) or "it has none"
    problems = []
    for key, value in options.items():
        if key not in defaults:
            problems.append(f"reward {name}: unknown option {key!r}; known: {known}")
        elif not _fits(value, defaults[key]):
            kind = "an integer" if isinstance(defaults[key], int) else "a number"
            problems.append(f"reward {name}: option {key}: got {value!r}, needs {kind}")
    if problems:
        raise UserError(*problems)
    try:
        judge: Judge = maker(**options)
    except ValueError as error:
        raise UserError(f"reward {name}: {error}, got {dict(options)}") from None
    return judge


def _fits(value: object, default: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    whole_enough = isinstance(value, int) or isinstance(default, float)
    return whole_enough and abs(value) < _LARGEST  # inf and nan are not
