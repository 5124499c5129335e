"""What makes versions out of prompts: GRPO, or imitation of answers (supervised fine-tuning)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from medrl.actors.buffer import Buffer, BufferState, GroupBuffer
from medrl.cluster.journal import Journal
from medrl.cluster.loop import Parts, train
from medrl.cluster.requests import Requests
from medrl.cluster.start import System
from medrl.configs.schema import Config

AfterStep = Callable[[int], Awaitable[None]]


class Trainer(Protocol):
    """A method, as a run drives it."""

    pushes: bool  # whether every version is brought to the engines

    @property
    def version(self) -> int: ...

    @property
    def settled(self) -> bool:
        """Whether weights and `state` belong together, so that both may be saved."""
        ...

    def state(self) -> BufferState: ...

    def restore(self, state: BufferState) -> None: ...

    async def stop(self) -> None:
        """Have `train` return after the step it is in."""
        ...

    async def train(self, after_step: AfterStep) -> None:
        """All steps that are left."""
        ...


def make_trainer(config: Config, requests: Requests, system: System, journal: Journal) -> Trainer:
    """The one that `run.method` names."""
    kind = Imitation if config.run.method == "sft" else Grpo
    return kind(config, requests, system, journal)


class Grpo:
    """`cluster.loop` with its buffer."""

    pushes = True

    def __init__(
        self, config: Config, requests: Requests, system: System, journal: Journal
    ) -> None:
        self._config = config
        self._requests = requests
        self._system = system
        self._journal = journal
        self._buffer = GroupBuffer(
            prompts=config.rollout.prompts,
            staleness=config.rollout.staleness,
            total_batches=config.run.steps,
            max_replaced=config.rollout.max_replaced,
        )

    @property
    def version(self) -> int:
        return self._buffer.version

    @property
    def settled(self) -> bool:
        return self._buffer.settled

    def state(self) -> BufferState:
        return self._buffer.state()

    def restore(self, state: BufferState) -> None:
        self._buffer.restore(state)

    async def stop(self) -> None:
        await self._buffer.stop()

    async def train(self, after_step: AfterStep) -> None:
        self._system.sampler.take_idle_seconds()
        await train(
            parts_of(
                self._config, self._requests, self._system, self._journal, self._buffer, after_step
            )
        )


def parts_of(
    config: Config,
    requests: Requests,
    system: System,
    journal: Journal,
    buffer: Buffer,
    after_step: AfterStep,
) -> Parts:
    """What the loop joins, of a run that is up."""
    return Parts(
        request=requests.train,
        sampler=system.sampler,
        scorer=system.scorer,
        buffer=buffer,
        learner=system.learner,
        sync=system.sync,
        journal=journal,
        after_step=after_step,
        max_failed_fraction=config.reward.max_failed_fraction,
        take_turns=config.placement.colocate,
    )


class Imitation:
    """A step: the next P prompts with their answers, to the learner. Engines only evaluate."""

    pushes = False

    def __init__(
        self, config: Config, requests: Requests, system: System, journal: Journal
    ) -> None:
        self._prompts = config.rollout.prompts
        self._steps = config.run.steps
        self._requests = requests
        self._learner = system.learner
        self._journal = journal
        self._stopped = False
        self.version = 0
        self.settled = True

    def state(self) -> BufferState:
        next_draw = self.version * self._prompts
        return BufferState(version=self.version, next_draw=next_draw, started={}, ready=())

    def restore(self, state: BufferState) -> None:
        self.version = state.version

    async def stop(self) -> None:
        self._stopped = True

    async def train(self, after_step: AfterStep) -> None:
        while self.version < self._steps and not self._stopped:
            first = self.version * self._prompts
            batch = [self._requests.example(draw) for draw in range(first, first + self._prompts)]
            self.settled = False
            update = await self._learner.imitate(batch)
            self.version += 1
            self.settled = True
            self._journal.record_imitation(self.version, update)
            await after_step(self.version)
