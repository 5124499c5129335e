"""The learner on Ray: a process a rank, and the `Learner` that speaks to all of them.

A call goes to every rank, for each is a collective. The first failure is told with the rank it came
from; the others are left to the collective's own timeout.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from medrl.actors.actor import death
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
from medrl.configs.errors import CheckpointError, LearnerError, MedrlError, as_death
from medrl.learner.settings import LearnerSettings

_GRACE_S = 5.0
"""How long to wait for other ranks' errors after the first: the one that lost its peer may report
before the peer's death is known."""


class LearnerRankActor:
    """Shell of `DeepSpeedRank` in a Ray process; built by `create_learner`."""

    def __init__(self, settings: LearnerSettings, rank: int, world: int) -> None:
        self._settings, self._rank, self._world = settings, rank, world
        self._engine: Any = None

    def free_address(self) -> tuple[str, int]:
        """This node's address, and a port that is free there now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, address: str, port: int) -> None:
        from medrl.learner.deepspeed_engine import DeepSpeedRank

        self._engine = DeepSpeedRank(
            self._settings, rank=self._rank, world=self._world, address=address, port=port
        )

    def update(self, batch: Sequence[ScoredGroup]) -> UpdateMetrics:
        metrics: UpdateMetrics = self._engine.update(batch)
        return metrics

    def imitate(self, batch: Sequence[Example]) -> ImitationMetrics:
        metrics: ImitationMetrics = self._engine.imitate(batch)
        return metrics

    def logprobs(self, group: Group) -> tuple[tuple[float, ...], ...]:
        found: tuple[tuple[float, ...], ...] = self._engine.logprobs(group)
        return found

    def weights(self) -> tuple[WeightMeta, ...]:
        metas: tuple[WeightMeta, ...] = self._engine.weights()
        return metas

    def open_transfer(self, plan: SyncPlan) -> None:
        self._engine.open_transfer(plan)

    def send(self) -> Sent:
        sent: Sent = self._engine.send()
        return sent

    def save(self, folder: Path) -> None:
        try:
            self._engine.save(folder)
        except (OSError, RuntimeError) as error:  # torch has a full disk be a RuntimeError
            raise CheckpointError(f"writing {folder}: {error}") from error

    def load(self, folder: Path) -> None:
        self._engine.load(folder)

    def export(self, folder: Path) -> None:
        self._engine.export(folder)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


async def create_learner(
    settings: LearnerSettings,
    *,
    world: int,
    options_for_rank: Callable[[int], Mapping[str, Any]],
    timeout_s: float,
) -> RayLearner:
    """Start `world` ranks, each with the Ray actor options of its number, and load the model.

    Raises `LearnerError` where they are not up within `timeout_s`, `UserError` for a model that
    cannot be trained.
    """
    remote = ray.remote(LearnerRankActor)

    def make() -> list[Any]:
        return [
            remote.options(**options_for_rank(rank)).remote(settings, rank, world)
            for rank in range(world)
        ]

    learner = RayLearner(make, timeout_s)
    await learner.restart()
    return learner


class RayLearner:
    """Obeys `learner.learner.Learner` over rank actors. Build it with `create_learner`."""

    def __init__(self, make: Callable[[], Sequence[Any]], timeout_s: float) -> None:
        """`make`: new rank actors, in order; they have `timeout_s` to load the model."""
        self._make = make
        self._timeout_s = timeout_s
        self._ranks: list[Any] = []

    async def restart(self) -> None:
        """All ranks, for they hold parts of one optimiser: none can go on without the others."""
        await self.close()
        self._ranks = list(self._make())
        try:
            async with asyncio.timeout(self._timeout_s):
                address, port = await self.transfer_address()
                await self.each("start", lambda rank: rank.start.remote(address, port))
        except TimeoutError as error:
            text = (
                f"{len(self._ranks)} learner rank(s) were not up within {self._timeout_s:g} s: "
                "give them resources, or raise placement.start_timeout_s"
            )
            await self.close()
            raise as_death(LearnerError(text)) from error
        except BaseException:
            await self.close()
            raise

    async def update(self, batch: Sequence[ScoredGroup]) -> UpdateMetrics:
        shared = ray.put(tuple(batch))
        metrics: UpdateMetrics = (
            await self.each("update", lambda rank: rank.update.remote(shared))
        )[0]
        return metrics

    async def imitate(self, batch: Sequence[Example]) -> ImitationMetrics:
        shared = ray.put(tuple(batch))
        metrics: ImitationMetrics = (
            await self.each("supervised step", lambda rank: rank.imitate.remote(shared))
        )[0]
        return metrics

    async def logprobs(self, group: Group) -> tuple[tuple[float, ...], ...]:
        shared = ray.put(group)
        found: tuple[tuple[float, ...], ...] = (
            await self.each("log-probs", lambda rank: rank.logprobs.remote(shared))
        )[0]
        return found

    async def weights(self) -> tuple[WeightMeta, ...]:
        metas: tuple[WeightMeta, ...] = (
            await self.each("weights", lambda rank: rank.weights.remote())
        )[0]
        return metas

    async def transfer_address(self) -> tuple[str, int]:
        address: tuple[str, int] = (
            await self.each("address", lambda rank: rank.free_address.remote(), self._ranks[:1])
        )[0]
        return address

    async def open_transfer(self, plan: SyncPlan) -> None:
        await self.each("opening a transfer", lambda rank: rank.open_transfer.remote(plan))

    async def send(self) -> Sent:
        sent: Sent = (await self.each("sending weights", lambda rank: rank.send.remote()))[0]
        return sent

    async def save(self, folder: Path) -> None:
        await self.each("saving", lambda rank: rank.save.remote(folder))

    async def load(self, folder: Path) -> None:
        await self.each("loading", lambda rank: rank.load.remote(folder))

    async def export(self, folder: Path) -> None:
        await self.each("exporting", lambda rank: rank.export.remote(folder))

    async def close(self) -> None:
        """Safe to call twice; `restart` may follow."""
        ranks, self._ranks = self._ranks, []
        for rank in ranks:  # no goodbye: it would wait for a rank that hangs in a collective
            ray.kill(rank)

    async def each(
        self, what: str, call: Callable[[Any], Awaitable[Any]], ranks: Sequence[Any] | None = None
    ) -> list[Any]:
        """`call` on every rank at once; their answers in order of rank."""
        if not self._ranks:
            raise LearnerError(f"{what}: the learner is closed")

        async def answer(rank: Any) -> Any:
            return await call(rank)

        tasks = [asyncio.create_task(answer(rank)) for rank in ranks or self._ranks]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if any(task.done() and task.exception() for task in tasks):
                await asyncio.wait(tasks, timeout=_GRACE_S)
                raise _error(what, tasks)
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()


def _error(what: str, tasks: Sequence[asyncio.Task[Any]]) -> MedrlError:
    """The failure to tell: a death before a mistake, a mistake before what either caused.

    What no rank raised on purpose counts as a death: a peer that is gone or hangs shows as a broken
    collective, and after any of them the ranks may be out of step."""
    failures = [
        (rank, error)
        for rank, task in enumerate(tasks)
        if task.done() and (error := task.exception()) is not None
    ]
    for rank, error in failures:
        if isinstance(error, RayActorError):
            text = f"learner rank {rank} died ({what}): {death(error)}"
            return _with_cause(as_death(LearnerError(text)), error)
    for _, error in failures:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, MedrlError):
            return _with_cause(cause, error)
    rank, error = failures[0]
    cause = error.cause if isinstance(error, RayTaskError) else error
    text = f"learner rank {rank} failed ({what}): {type(cause).__name__}: {cause}"
    return _with_cause(as_death(LearnerError(text)), error)


def _with_cause(error: MedrlError, cause: BaseException) -> MedrlError:
    error.__cause__ = cause
    return error
