"""The learner on Ray: a process a rank, and the `Learner` that speaks to all of them.

A call goes to every rank, for each is a collective. The first failure is told with the rank it came
from; the others are left to the collective's own timeout. While a call goes on, a second thread of
each rank answers pings: a process that is stopped, or stuck with the interpreter's lock, does not.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from medrl.actors.actor import in_place
from medrl.actors.heartbeat import answer
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
from medrl.configs.errors import CheckpointError, LearnerError, as_death
from medrl.learner.rank_failures import failure_to_tell
from medrl.learner.settings import LearnerSettings

_GRACE_S = 5.0
"""How long to wait for other ranks' errors after the first: the one that lost its peer may report
before the peer's death is known."""

_FILES = 10.0
"""Times heartbeat_s for calls that read or write files: one large tensor may hold the interpreter's
lock as long as a slow disk takes for it."""

_PING = "ping"  # Ray's name for the thread that answers
_NO_PING = 0.0  # for calls whose caller has a deadline


class LearnerRankActor:
    """Shell of `DeepSpeedRank` in a Ray process; built by `create_learner`."""

    def __init__(self, settings: LearnerSettings, rank: int, world: int) -> None:
        self._settings, self._rank, self._world = settings, rank, world
        self._engine: Any = None

    def ping(self) -> None:
        """Answer, also while another call is at work."""

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
        with self._advice():
            metrics: UpdateMetrics = self._engine.update(batch)
        return metrics

    def imitate(self, batch: Sequence[Example]) -> ImitationMetrics:
        with self._advice():
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

    def save(self, folder: Path) -> list[str]:
        """Returns the files that this rank's node has there."""
        self._engine.save(folder)
        return _files_in(folder)

    def load(self, folder: Path) -> None:
        self._engine.load(folder)

    def export(self, folder: Path) -> list[str]:
        """Returns the files that this rank's node has there."""
        self._engine.export(folder)
        return _files_in(folder)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _advice(self) -> AbstractContextManager[None]:
        from medrl.learner.memory import advice_on_memory

        return advice_on_memory(self._settings, self._rank)


async def create_learner(
    settings: LearnerSettings,
    *,
    world: int,
    options_for_rank: Callable[[int], Mapping[str, Any]],
    timeout_s: float,
    heartbeat_s: float,
) -> RayLearner:
    """Start `world` ranks, each with the Ray actor options of its number, and load the model. One
    that then answers no ping within `heartbeat_s` of a call counts as dead.

    Raises `LearnerError` where they are not up within `timeout_s`, `UserError` for a model that
    cannot be trained.
    """
    remote = ray.remote(concurrency_groups={_PING: 1})(LearnerRankActor)

    def make(rank: int) -> Any:
        return remote.options(**options_for_rank(rank)).remote(settings, rank, world)

    learner = RayLearner([partial(make, rank) for rank in range(world)], timeout_s, heartbeat_s)
    await learner.restart()
    return learner


class RayLearner:
    """Obeys `learner.learner.Learner` over rank actors. Build it with `create_learner`."""

    def __init__(
        self, make: Sequence[Callable[[], Any]], timeout_s: float, heartbeat_s: float
    ) -> None:
        """`make`: of each rank, what asks Ray for its actor. All have `timeout_s` to find room, and
        again to load the model."""
        self._make = make
        self._timeout_s = timeout_s
        self._heartbeat_s = heartbeat_s
        self._ranks: list[Any] = []

    async def restart(self) -> None:
        """All ranks, for they hold parts of one optimiser: none can go on without the others."""
        await self.close()
        try:
            await self._place()
            async with asyncio.timeout(self._timeout_s):
                address, port = await self.transfer_address()
                await self.each(
                    "start", lambda rank: rank.start.remote(address, port), patience=_NO_PING
                )
        except TimeoutError as error:
            text = (
                f"{len(self._ranks)} learner rank(s) were not up within {self._timeout_s:g} s "
                "(placement.start_timeout_s) of having room"
            )
            await self.close()
            raise as_death(LearnerError(text)) from error
        except BaseException:
            await self.close()
            raise

    async def _place(self) -> None:
        """Have all ranks run, on nodes that are there. Where one has no room, none starts."""
        placing = [asyncio.ensure_future(in_place(make)) for make in self._make]
        try:
            async with asyncio.timeout(self._timeout_s):
                await asyncio.gather(*placing)
        except TimeoutError:
            lacking = sum(not one.done() or one.cancelled() for one in placing)
            raise LearnerError(
                f"no room for {lacking} of {len(placing)} learner rank(s) within "
                f"{self._timeout_s:g} s (placement.start_timeout_s): give them a node, and go on "
                "from the last checkpoint with --resume"
            ) from None
        except RayError as error:
            raise as_death(LearnerError(f"a learner rank cannot be started: {error}")) from error
        finally:
            for one in placing:
                one.cancel()
            ended = await asyncio.gather(*placing, return_exceptions=True)
            self._ranks = [one for one in ended if not isinstance(one, BaseException)]

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
            await self.each(
                "address",
                lambda rank: rank.free_address.remote(),
                self._ranks[:1],
                patience=_NO_PING,
            )
        )[0]
        return address

    async def open_transfer(self, plan: SyncPlan) -> None:
        await self.each("opening a transfer", lambda rank: rank.open_transfer.remote(plan))

    async def send(self) -> Sent:
        sent: Sent = (await self.each("sending weights", lambda rank: rank.send.remote()))[0]
        return sent

    # Ranks may have another working directory, on other nodes for sure.

    async def save(self, folder: Path) -> None:
        there = await self.each(
            "saving", lambda rank: rank.save.remote(folder.absolute()), patience=_FILES
        )
        refuse_unshared(folder, there)

    async def load(self, folder: Path) -> None:
        await self.each(
            "loading", lambda rank: rank.load.remote(folder.absolute()), patience=_FILES
        )

    async def export(self, folder: Path) -> None:
        there = await self.each(
            "exporting", lambda rank: rank.export.remote(folder.absolute()), patience=_FILES
        )
        refuse_unshared(folder, there)

    async def close(self) -> None:
        """Safe to call twice; `restart` may follow."""
        ranks, self._ranks = self._ranks, []
        for rank in ranks:  # no goodbye: it would wait for a rank that hangs in a collective
            ray.kill(rank)

    async def each(
        self,
        what: str,
        call: Callable[[Any], Awaitable[Any]],
        ranks: Sequence[Any] | None = None,
        *,
        patience: float = 1.0,
    ) -> list[Any]:
        """`call` on every rank at once; their answers in order of rank. Each has to answer pings
        within `patience` times heartbeat_s meanwhile; 0: none."""
        if not self._ranks:
            raise LearnerError(f"{what}: the learner is closed")

        async def ask(rank: Any) -> Any:
            if not patience:
                return await call(rank)
            ping = rank.ping.options(concurrency_group=_PING).remote
            return await answer(call(rank), ping, patience * self._heartbeat_s)

        tasks = [asyncio.create_task(ask(rank)) for rank in ranks or self._ranks]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if any(task.done() and task.exception() for task in tasks):
                await asyncio.wait(tasks, timeout=_GRACE_S)
                raise failure_to_tell(what, tasks)
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()


def _files_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def refuse_unshared(folder: Path, there: Sequence[Sequence[str]]) -> None:
    """Raises `CheckpointError` where the ranks' nodes have files that are not to be seen here: what
    is sealed, or resumed from, would lack them."""
    here = set(_files_in(folder))
    for rank, names in enumerate(there):
        if unseen := sorted(set(names) - here):
            raise CheckpointError(
                f"learner rank {rank} wrote {unseen[0]} to {folder.absolute()}, and the driver's "
                "node does not have it: run.dir must be a folder that all nodes share"
            )
