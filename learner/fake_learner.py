"""A learner in plain Python that obeys the `Learner` protocol, for tests of the loop in a second.

Its only weight, `skill`, is the chance of a good completion (`actors.fake_engine`). An update moves
it along the REINFORCE gradient with the group mean as baseline, so good rewards do raise it and
shuffled ones do not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from medrl.actors.fake_engine import FakeWire, Tensor, fake_digest
from medrl.actors.types import (
    Completion,
    Example,
    Group,
    ImitationMetrics,
    ScoredGroup,
    Sent,
    SyncPlan,
    UpdateMetrics,
    WeightMeta,
)
from medrl.configs.errors import CheckpointError, LearnerError

EDGE = 0.02  # skill stays this far from 0 and 1, where the gradient ends


class FakeLearner:
    """Refuses batches of mixed sizes and sends outside a transfer group, as the real one does."""

    def __init__(self, wire: FakeWire, *, skill: float, learning_rate: float) -> None:
        self._wire = wire
        self._plan: SyncPlan | None = None
        self._learning_rate = learning_rate
        self._start = skill
        self.skill = skill
        self.updates = 0

    async def restart(self) -> None:
        self._plan = None
        self.skill, self.updates = self._start, 0

    async def update(self, batch: Sequence[ScoredGroup]) -> UpdateMetrics:
        if not batch:
            raise LearnerError("an update needs at least one group")
        advantages = tuple(_centered(group) for group in batch)
        pairs = [
            (_is_good(completion), advantage)
            for group, row in zip(batch, advantages, strict=True)
            for completion, advantage in zip(group.group.completions, row, strict=True)
        ]
        # d log p / d skill is 1 / skill for a good completion and -1 / (1 - skill) for a bad one.
        gradient = fmean(a / self.skill if good else -a / (1 - self.skill) for good, a in pairs)
        self.skill = min(1 - EDGE, max(EDGE, self.skill + self._learning_rate * gradient))
        self.updates += 1
        completions = [c for group in batch for c in group.group.completions]
        return UpdateMetrics(
            loss=-fmean(a for _, a in pairs),
            kl=0.0,
            entropy=0.0,
            clip_fraction=0.0,
            gradient_norm=abs(gradient),
            learning_rate=self._learning_rate,
            logprob_gap_mean=0.0,
            logprob_gap_max=0.0,
            zero_variance_groups=sum(not any(row) for row in advantages),
            trained_completions=len(completions),
            prompt_tokens=sum(len(group.group.prompt_token_ids) for group in batch),
            completion_tokens=sum(len(c.token_ids) for c in completions),
            visual_tokens=0,
            sharing=1.0,
            advantages=advantages,
            seconds=0.0,
        )

    async def imitate(self, batch: Sequence[Example]) -> ImitationMetrics:
        """Every target counts as a good completion, of one token."""
        if not batch:
            raise LearnerError("a supervised step needs at least one example")
        loss, gradient = -math.log(self.skill), 1 / self.skill
        self.skill = min(1 - EDGE, self.skill + self._learning_rate * gradient)
        self.updates += 1
        return ImitationMetrics(
            loss=loss,
            gradient_norm=gradient,
            learning_rate=self._learning_rate,
            tokens=len(batch),
            seconds=0.0,
        )

    async def logprobs(self, group: Group) -> tuple[tuple[float, ...], ...]:
        return tuple(completion.logprobs for completion in group.completions)

    async def weights(self) -> tuple[WeightMeta, ...]:
        return (WeightMeta(name="skill", dtype="float32", shape=(1,)),)

    async def transfer_address(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    async def open_transfer(self, plan: SyncPlan) -> None:
        self._plan = plan

    async def send(self) -> Sent:
        if self._plan is None:
            raise LearnerError("send needs a transfer group: call open_transfer first")
        tensor: Tensor = (self.skill,)
        for mailbox in self._wire.mailboxes.values():
            mailbox.put_nowait(("skill", tensor))
        return Sent(tensors=1, bytes=4, digests={"skill": fake_digest(tensor)}, seconds=0.0)

    async def save(self, folder: Path) -> None:
        state = {"skill": self.skill, "updates": self.updates}
        (folder / "fake.json").write_text(json.dumps(state))

    async def load(self, folder: Path) -> None:
        try:
            state = json.loads((folder / "fake.json").read_text())
        except OSError as error:
            raise CheckpointError(f"{folder} is no checkpoint of a fake learner: {error}") from None
        self.skill, self.updates = state["skill"], state["updates"]

    async def export(self, folder: Path) -> None:
        await self.save(folder)

    async def close(self) -> None:
        self._plan = None


def _centered(group: ScoredGroup) -> tuple[float, ...]:
    kept = [score.total for score in group.scores if not score.failed]
    mean = fmean(kept) if kept else 0.0
    return tuple(0.0 if score.failed else score.total - mean for score in group.scores)


def _is_good(completion: Completion) -> bool:
    return completion.text.startswith("<answer>") and "Z" not in completion.text
