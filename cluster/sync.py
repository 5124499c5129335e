"""Bring a version to every engine, and prove that it arrived. Plain asyncio, no Ray.

Two invariants live here:
- *An engine serves only after it holds a version that a receipt proves*: after a failed push all
  stay paused, and an engine that was restarted or added waits for the next push.
- *The order of a push*: pause (requests end, caches are cleared), update, canary, resume. It ends
  before the caller goes on, so no optimiser step changes weights that are on their way.

    pause all -> learner.send ‖ engine.receive -> digests equal?
              -> canary: |engine - learner| small? -> resume all -> Receipt

The digests prove what arrived; the canary, a prompt with an image, that it is what the engine now
computes with: stale caches and stale packed weights show nowhere else.

An engine that dies on the way leaves the pool, and the push is made again with the others. What
arrived wrong is not tried again: that stops the run, and so does, here, the learner's death.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping
from typing import Any, Literal, TypeVar

from medrl.actors.engine import Engine
from medrl.actors.pool import EnginePool
from medrl.actors.types import Receipt, RolloutRequest, Sent, SyncPlan, WeightMeta
from medrl.cluster.proof import first_difference, logprob_gap
from medrl.configs.errors import (
    EngineError,
    LearnerError,
    MedrlError,
    UserError,
    WeightSyncError,
    as_death,
)
from medrl.learner.learner import Learner

BUCKET_BYTES = {"gloo": 32 * 1024**2, "nccl": 512 * 1024**2, "ipc": 512 * 1024**2}
"""What is gathered and sent at a time. A CPU engine loads one bucket while the next arrives: of 4,
8, 16 and 32 MiB, the last was fastest for a 125 MB model. Weights that engines read in memory
of the learner's (`Lane`) are one bucket. Kernels on GPUs want more."""

MAX_GAP = {"float32": 1e-4, "bfloat16": 0.1}
"""Largest |engine - learner| log-prob allowed on the canary, nats, by the weights' type. In float32
the two implementations agree to 1e-6; bfloat16 rounds differently in each."""

MAX_ATTEMPTS = 4
"""A push is made so often where a broken connection ends it: a port can be taken, but what fails so
often in a row will not heal. One that an engine's death ended counts as that engine's."""

T = TypeVar("T")

_LEARNER = -1  # among the indices of engines
_GRACE_S = 5.0  # a collective's own deadline comes first, for its error says more
RANKS_GRACE_S = 2.0
"""Ranks wait longer for each other than rank 0 waits for an engine: where that one hangs in a sync,
they outlive it. Less than the sync waits for them all."""


class Sync:
    """Owns the transfer group of a learner and its engines."""

    def __init__(
        self,
        *,
        pool: EnginePool,
        learner: Learner,
        transport: Literal["gloo", "nccl", "ipc"],
        canary: RolloutRequest,
        max_gap: float,
        timeout_s: float,
        drain_timeout_s: float = 0.0,
        workers_per_engine: int = 1,
        bucket_bytes: int = 0,
        share_memory: bool = True,
    ) -> None:
        """`canary`: greedy, a few tokens, with an image. `max_gap`: nats, see `MAX_GAP`.
        `timeout_s`: of any one phase; `drain_timeout_s`: of pausing, if that is more, for running
        groups end first. `bucket_bytes`: 0 for the transport's `BUCKET_BYTES`. `share_memory`:
        gloo, where learner and engines are on one machine."""
        self._pool = pool
        self._learner = learner
        self._transport = transport
        self._canary = canary
        self._max_gap = max_gap
        self._timeout_s = timeout_s
        self._drain_timeout_s = max(timeout_s, drain_timeout_s)
        self._workers = workers_per_engine
        self._bucket_bytes = bucket_bytes or BUCKET_BYTES[transport]
        self._share_memory = share_memory
        self._members: dict[int, Engine] = {}  # of the open transfer group; empty: none is open
        self._pushed: tuple[int, int] | None = None  # version and step of the last push
        self._failed: list[WeightSyncError] = []  # pushes in a row
        self._weights: tuple[WeightMeta, ...] = ()

    async def push(self, version: int, step: int) -> Receipt:
        """Bring the learner's weights to all engines as `version`; where none is up, wait for one.

        Raises `WeightSyncError` (then no engine serves), `EngineError` where no engine is left,
        `LearnerError` where the learner died."""
        self._pushed = version, step
        receipt = None
        while receipt is None:
            await self._pool.until(lambda: self._pool.up)
            receipt = await self._attempt(self._pool.up, version, step)
        return receipt

    def close_group(self) -> None:
        """The learner was started again: the next push forms a new group."""
        self._members, self._pushed = {}, None

    async def attend(self, work: Awaitable[T], record: Callable[[Receipt], None]) -> T:
        """Await `work`, which needs engines and leaves the learner idle. Engines that came back are
        brought the version last pushed meanwhile, and the others serve on; `record` gets the
        receipts. Raises what `work` and `push` do."""
        task = asyncio.ensure_future(work)
        try:
            while self._pushed and await self._stale_before(task):
                if receipt := await self._attempt(self._pool.stale, *self._pushed):
                    record(receipt)
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def pause(self) -> None:
        """Stop all engines until a push. A push does so itself: call it before an update where
        learner and engines take turns on a GPU."""
        try:
            await self._pause(self._pool.up)
        except WeightSyncError as error:
            if not error.died:
                raise

    async def _stale_before(self, task: asyncio.Future[Any]) -> bool:
        """Wait for `task`, or a stale engine before it is done; whether there is one."""
        stale = asyncio.ensure_future(self._pool.until(lambda: self._pool.stale))
        await asyncio.wait({task, stale}, return_when=asyncio.FIRST_COMPLETED)
        stale.cancel()
        await asyncio.gather(stale, return_exceptions=True)  # no engine left: `task` tells as well
        return bool(self._pool.stale) and not task.done()

    async def _attempt(
        self, members: Mapping[int, Engine], version: int, step: int
    ) -> Receipt | None:
        """A push; None where it failed and may be made again."""
        try:
            receipt = await self._push(members, version, step)
        except WeightSyncError as error:
            if not error.died:
                raise
            up = self._pool.up
            if any(up.get(i) is not engine for i, engine in members.items()):
                return None
            self._failed.append(error)
            if len(self._failed) == MAX_ATTEMPTS:
                first, self._failed = self._failed[0], []
                raise WeightSyncError(f"{first}\n{MAX_ATTEMPTS} pushes in a row failed") from error
            return None
        self._failed = []
        return receipt

    async def _push(self, members: Mapping[int, Engine], version: int, step: int) -> Receipt:
        started = time.perf_counter()
        await self._pause(members)
        if members != self._members:
            await self._open(members)
        self._members = {}  # only a whole push leaves a group to use again
        began = time.perf_counter()
        sent = await self._transfer(members)
        seconds_transfer = time.perf_counter() - began
        gap = await self._prove(members)
        await self._together("resuming", members, {i: members[i].resume(version) for i in members})
        self._members = dict(members)
        self._pool.serve(members)
        return Receipt(
            version=version,
            step=step,
            transport=self._transport,
            engines=len(members),
            tensors=sent.tensors,
            bytes=sent.bytes,
            seconds=time.perf_counter() - started,
            seconds_transfer=seconds_transfer,
            digests_equal=True,
            canary_gap=gap,
        )

    async def _pause(self, members: Mapping[int, Engine]) -> None:
        pausing = {i: members[i].pause() for i in members}
        await self._together("pausing", members, pausing, self._drain_timeout_s)
        self._pool.rest(members)

    async def _open(self, members: Mapping[int, Engine]) -> None:
        """Form a new transfer group."""
        self._members = {}
        asked = await self._together(
            "preparing a transfer group",
            members,
            {_LEARNER: _both(self._learner.transfer_address, self._learner.weights)},
        )
        (address, port), self._weights = asked[_LEARNER]
        plan = SyncPlan(
            transport=self._transport,
            address=address,
            port=port,
            world_size=1 + len(members) * self._workers,
            bucket_bytes=self._bucket_bytes,
            timeout_s=self._timeout_s,
            share_memory=self._share_memory,
        )
        joining: dict[int, Awaitable[None]] = {_LEARNER: self._learner.open_transfer(plan)}
        for rank, (index, engine) in enumerate(members.items(), start=1):
            joining[index] = engine.open_transfer(plan, rank)
        await self._together("joining the transfer group", members, joining)

    async def _transfer(self, members: Mapping[int, Engine]) -> Sent:
        """Move all weights; raise where what arrived is not what left."""
        moving: dict[int, Awaitable[Any]] = {_LEARNER: self._learner.send()}
        moving |= {i: members[i].receive(self._weights) for i in members}
        results = await self._together("moving weights", members, moving)
        sent: Sent = results.pop(_LEARNER)
        for index, received in results.items():
            if difference := first_difference(sent.digests, received):
                raise WeightSyncError(
                    f"sync: engine {index} received other weights than the learner sent. "
                    f"{difference}. Memory or network of one of the two hosts is broken"
                )
        return sent

    async def _prove(self, members: Mapping[int, Engine]) -> float:
        """Largest |engine - learner| log-prob on the canary, over engines and tokens; nats."""
        canaries = {i: members[i].canary(self._canary) for i in members}
        groups = await self._together("sampling the canary", members, canaries)
        scored: dict[Hashable, Any] = {}  # once where engines say the same: it is most of a push
        largest = 0.0
        for index, group in groups.items():
            said = (
                group.prompt_token_ids,
                group.image_hashes,
                *(c.token_ids for c in group.completions),
            )
            if said not in scored:
                scoring = {_LEARNER: self._learner.logprobs(group)}
                answers = await self._together("scoring the canary", members, scoring)
                scored[said] = answers[_LEARNER]
            gap = logprob_gap(group, scored[said])
            if not gap <= self._max_gap:  # also where it is not a number
                raise WeightSyncError(
                    f"sync: all weights arrived at engine {index}, but on the canary prompt its "
                    f"log-probs are up to {gap:.3g} from the learner's ({self._max_gap:g} is "
                    "allowed): it computes with other weights than it was given, or another way"
                )
            largest = max(largest, gap)
        return largest

    async def _together(
        self,
        phase: str,
        members: Mapping[int, Engine],
        calls: Mapping[int, Awaitable[Any]],
        timeout_s: float = 0.0,
    ) -> dict[int, Any]:
        """Await all calls, by who answers. All end, or reach the deadline, before an error is
        raised: a party that is still at work must not be called again. Engines that died leave the
        pool; the error says by `died` that a push may be made again."""
        deadline = (timeout_s or self._timeout_s) + _GRACE_S
        answers = await asyncio.gather(
            *(asyncio.wait_for(call, deadline) for call in calls.values()), return_exceptions=True
        )
        results = dict(zip(calls, answers, strict=True))
        failures = {
            who: _failure(who, it, deadline)
            for who, it in results.items()
            if isinstance(it, BaseException)
        }
        for who, failure in failures.items():
            if who != _LEARNER and failure.died:
                self._pool.fail(who, members[who], failure)
        if not failures:
            return results
        cause = next(iter(failures.values()))
        if isinstance(cause, UserError):
            raise cause
        if _LEARNER in failures and failures[_LEARNER].died:
            raise failures[_LEARNER]
        told = "; ".join(f"{_name(who)}: {failure}" for who, failure in failures.items())
        raise as_death(WeightSyncError(f"sync: {phase} failed. {told}")) from cause


def _name(who: int) -> str:
    return "learner" if who == _LEARNER else f"engine {who}"


def _failure(who: int, error: BaseException, deadline: float) -> MedrlError:
    """Who does not answer in time is as good as dead."""
    if isinstance(error, MedrlError):
        return error
    kind = LearnerError if who == _LEARNER else EngineError
    if isinstance(error, TimeoutError):
        return as_death(kind(f"no answer within {deadline:g} s"))
    return kind(str(error) or type(error).__name__)


async def _both(
    first: Callable[[], Awaitable[Any]], second: Callable[[], Awaitable[Any]]
) -> tuple[Any, Any]:
    """One after the other: a learner's calls never overlap."""
    return await first(), await second()
