"""Whether a learner that keeps dying still gets anywhere."""

from __future__ import annotations

from medrl.actors.pool import MAX_DEATHS
from medrl.configs.errors import LearnerError


class Crashes:
    """Deaths in a row, without a step further than at the first of them."""

    def __init__(self) -> None:
        self._furthest = -1  # step
        self._deaths: list[LearnerError] = []

    def add(self, step: int, death: LearnerError) -> None:
        """It died after `step`. Raises `LearnerError`, the first cause on top, for a crash loop."""
        if step > self._furthest:
            self._furthest, self._deaths = step, []
        self._deaths.append(death)
        if len(self._deaths) == MAX_DEATHS:
            raise LearnerError(
                f"{self._deaths[0]}\nthe learner died {MAX_DEATHS} times without getting past step "
                f"{self._furthest}; the checkpoints are there to go on from (--resume)"
            ) from death
