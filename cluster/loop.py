"""THE loop: GRPO as two coroutines that meet in a buffer. Synchronous is staleness 0.

    roll_out ──admit──> draw ──> request ──> sampler ──> scorer ──put──┐
        ^                                                              v
        └───────────────── advance(version) ──────────────────── GroupBuffer
                                  ^                                    │ take: P groups
                 sync.push <── learner.update <────────────────────────┘
                      └── journal, evaluation, checkpoint

roll_out  consumes room in the buffer, produces scored groups; waits in `admit` for `advance`.
train     consumes batches, produces versions; waits in `take` for `put`, the end, or `stop`.

A push ends before the next update starts, and groups of the new version start after it. An error
of `roll_out` reaches `train` in `take`, between two updates, so that a checkpoint can be made.
While `train` waits there the learner is idle: engines that were started again get its weights.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from medrl.actors.buffer import Buffer
from medrl.actors.sampler import Sampler
from medrl.actors.types import RolloutRequest
from medrl.cluster.journal import Journal
from medrl.cluster.metrics import refuse_failures
from medrl.cluster.sync import Sync
from medrl.learner.learner import Learner
from medrl.rewards.scorer import Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the loop joins."""

    request: Callable[[int], RolloutRequest]  # draw -> what to ask an engine
    sampler: Sampler
    scorer: Scorer
    buffer: Buffer
    learner: Learner
    sync: Sync
    journal: Journal
    after_step: Callable[[int], Awaitable[None]]  # evaluation and checkpoint, when due
    max_failed_fraction: float
    take_turns: bool = False  # engines and learner share devices: engines sleep while it works


async def train(parts: Parts) -> None:
    """Run until the buffer has no more batches: all steps done, or `buffer.stop()`."""
    rollouts = asyncio.create_task(roll_out(parts))
    try:
        while batch := await parts.sync.attend(parts.buffer.take(), parts.journal.record_sync):
            refuse_failures(batch, parts.max_failed_fraction)
            parts.journal.begin_learning()
            if parts.take_turns:
                await parts.sync.pause()
            update = await parts.learner.update(batch)
            receipt, step, replaced = None, parts.buffer.version + 1, parts.buffer.replaced
            try:
                receipt = await parts.sync.push(version=step, step=step)
            finally:  # after a failed push too the update is made, and may be saved
                await parts.buffer.advance(step)
                idle = parts.sampler.take_idle_seconds()
                parts.journal.record_step(step, batch, update, receipt, idle, replaced)
            await parts.after_step(step)
    finally:
        rollouts.cancel()
        await asyncio.wait({rollouts})


async def roll_out(parts: Parts) -> None:
    """Keep as many groups in flight as the buffer admits."""

    async def one_group(draw: int) -> None:
        group = await parts.sampler.sample(parts.request(draw))
        await parts.buffer.put(await parts.scorer.score_group(group))

    try:
        async with asyncio.TaskGroup() as groups:
            while (draw := await parts.buffer.admit()) is not None:
                groups.create_task(one_group(draw))
    except* Exception as failures:
        await parts.buffer.fail(failures.exceptions[0])
