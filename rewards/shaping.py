"""Penalties on the text itself, in [-1, 0], whatever it answers: too long, repeating itself."""

from __future__ import annotations

from dataclasses import dataclass

from medrl.actors.types import Prompt
from medrl.rewards.modes import Mode
from medrl.rewards.open_answers import words


@dataclass(frozen=True, slots=True)
class Length:
    """DAPO's soft overlong punishment (equation 13), in characters, since rewards see no tokens: 0
    up to `longest` - `margin`, then down in a line to -1 at `longest`, and -1 beyond.
    """

    longest: int = 1024
    margin: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.margin <= self.longest:
            raise ValueError(f"margin needs to be between 1 and longest ({self.longest})")

    def __call__(self, mode: Mode, prompt: Prompt, completion: str) -> float:
        over = len(completion) - (self.longest - self.margin)
        return -min(1.0, over / self.margin) if over > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Repetition:
    """Minus the share of the completion's runs of `n` words that are repeats of an earlier one."""

    n: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.n <= 100:
            raise ValueError("n needs to be between 1 and 100")

    def __call__(self, mode: Mode, prompt: Prompt, completion: str) -> float:
        said = words(completion)
        runs = list(zip(*(said[start:] for start in range(self.n)), strict=False))
        return len(set(runs)) / len(runs) - 1.0 if runs else 0.0
