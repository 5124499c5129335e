"""Has the completion the form that its mode asks for? 1 or 0."""

from __future__ import annotations

from medrl.actors.types import Score
from medrl.rewards.modes import Mode


def judge_form(mode: Mode, completion: str) -> Score:
    """Judge the form alone. The mode states the rule."""
    well_formed, reason = mode.is_well_formed(completion)
    value = float(well_formed)
    return Score(components={"format": value}, total=value, outcome="ok", reason=reason)
