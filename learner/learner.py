"""The seam between the system and whatever updates the weights. Standard library only.

The real one is `learner.actor.RayLearner` over `learner.deepspeed_engine`, one process a rank;
`learner.fake_learner` obeys the same protocol in plain Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from medrl.actors.types import (
    Example,
    Group,
    ImitationMetrics,
    ScoredGroup,
    Sent,
    SyncPlan,
    UpdateMetrics,
    WeightMeta,
)


class Learner(Protocol):
    """Turns scored groups into new weights. Calls never overlap.

    Any call raises a `LearnerError` whose `died` is set where a part of it is gone or hangs: then
    only `restart` helps, and `load`. Other errors are refusals, on all ranks, and would come again.
    """

    async def restart(self) -> None:
        """Be as at the start of the run: the starting model, no optimiser steps."""
        ...

    async def update(self, batch: Sequence[ScoredGroup]) -> UpdateMetrics:
        """One batch: `updates_per_batch` optimiser steps. Raises `LearnerError`."""
        ...

    async def imitate(self, batch: Sequence[Example]) -> ImitationMetrics:
        """One supervised step over all examples; a version, as an update is. Raises
        `LearnerError`."""
        ...

    async def logprobs(self, group: Group) -> tuple[tuple[float, ...], ...]:
        """[G][C] log-probs of the group's completions under the weights as they are."""
        ...

    async def weights(self) -> tuple[WeightMeta, ...]:
        """Names, types and full shapes of what `send` sends, in its order."""
        ...

    async def transfer_address(self) -> tuple[str, int]:
        """Host of rank 0 as engines reach it, and a port that is free there now."""
        ...

    async def open_transfer(self, plan: SyncPlan) -> None:
        """Join the transfer group as rank 0. Needs the engines to join at the same time."""
        ...

    async def send(self) -> Sent:
        """Send all weights to the transfer group. Needs the engines to receive at the same time."""
        ...

    async def save(self, folder: Path) -> None:
        """Write weights (`folder/model`, a Hugging Face folder), optimiser, schedule and RNG into
        an existing folder. Making it whole or absent is the caller's."""
        ...

    async def load(self, folder: Path) -> None:
        """Go on from what `save` wrote. Raises `CheckpointError`."""
        ...

    async def export(self, folder: Path) -> None:
        """Write a Hugging Face folder that transformers and vLLM load as it is."""
        ...

    async def close(self) -> None:
        """Free everything; safe to call twice."""
        ...
