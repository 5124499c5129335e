"""The policies: what `accuracy` and `format` mean. A run names one in `reward.policy`.

Evaluation is always strict, whatever a run is trained on: see `scorer.StrictScorer`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from medrl.actors.types import Prompt, Score
from medrl.configs.errors import UserError
from medrl.rewards.accuracy import graded, lenient, strict
from medrl.rewards.format import judge_form
from medrl.rewards.medr1 import medr1_accuracy, medr1_form
from medrl.rewards.modes import Mode


@dataclass(frozen=True, slots=True)
class Policy:
    """Two judgements of a completion, each in [0, 1]."""

    accuracy: Callable[[Mode, Prompt, str], Score]
    form: Callable[[Mode, str], Score] = judge_form


POLICIES = {
    "strict": Policy(strict),
    "lenient": Policy(lenient),
    "graded": Policy(graded),
    "medr1": Policy(medr1_accuracy, medr1_form),
}


def get_policy(name: str) -> Policy:
    """Return a policy by its name. Raises UserError."""
    if name not in POLICIES:
        raise UserError(f"unknown policy {name!r}: choose one of {', '.join(POLICIES)}")
    return POLICIES[name]
