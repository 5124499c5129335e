"""Whether a learner that keeps dying still gets anywhere.

A process that is gone, or a connection, may be an accident: it is tried `MAX_DEATHS` times. What a
rank's own code raises, memory that ends among it, is tried once more.
"""

from __future__ import annotations

from medrl.actors.pool import MAX_DEATHS
from medrl.configs.errors import LearnerError


class Crashes:
    """Deaths in a row, without a step further than at the first of them."""

    def __init__(self) -> None:
        self._furthest = 0  # step
        self._deaths: list[LearnerError] = []

    @property
    def furthest(self) -> int:
        """The last step before a death: a checkpoint of it is worth having; 0: none died yet."""
        return self._furthest

    def add(self, step: int, death: LearnerError) -> None:
        """It died after `step`. Raises `LearnerError`, the first cause on top, for a crash loop."""
        if step > self._furthest:
            self._furthest, self._deaths = step, []
        if death.certain and self._deaths and _first_line(self._deaths[-1]) == _first_line(death):
            raise LearnerError(
                f"{death}\nthe same twice at step {self._furthest + 1}: it would come again; the "
                "checkpoints are there to go on from (--resume)"
            ) from death
        self._deaths.append(death)
        if len(self._deaths) == MAX_DEATHS:
            raise LearnerError(
                f"{self._deaths[0]}\nthe learner died {MAX_DEATHS} times without getting past step "
                f"{self._furthest}; the checkpoints are there to go on from (--resume)"
            ) from death


def _first_line(error: LearnerError) -> str:
    return str(error).partition("\n")[0]
