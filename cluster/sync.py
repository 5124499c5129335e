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
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Mapping
from typing import Any, Literal

from medrl.actors.engine import Engine
from medrl.actors.types import Group, Receipt, RolloutRequest, Sent, SyncPlan, WeightMeta
from medrl.configs.errors import UserError, WeightSyncError
from medrl.learner.learner import Learner

BUCKET_BYTES = {"gloo": 32 * 1024**2, "nccl": 512 * 1024**2, "ipc": 512 * 1024**2}
"""What is gathered and sent at a time. A CPU engine loads one bucket while the next arrives: of 4
to 256 MiB, 32 was fastest for a 120 MB model. Kernels on GPUs want more."""

MAX_GAP = {"float32": 1e-4, "bfloat16": 0.1}
"""Largest |engine - learner| log-prob allowed on the canary, nats, by the weights' type. In float32
the two implementations agree to 1e-6; bfloat16 rounds differently in each."""

_GRACE_S = 5.0  # a collective's own deadline comes first, for its error says more


class Sync:
    """Owns the transfer group of a learner and its engines."""

    def __init__(
        self,
        *,
        engines: Mapping[int, Engine],
        learner: Learner,
        transport: Literal["gloo", "nccl", "ipc"],
        canary: RolloutRequest,
        max_gap: float,
        timeout_s: float,
        drain_timeout_s: float = 0.0,
        workers_per_engine: int = 1,
        bucket_bytes: int = 0,
    ) -> None:
        """`engines`: the pool, by index; it may change between pushes. `canary`: greedy, a few
        tokens, with an image. `max_gap`: nats, see `MAX_GAP`. `timeout_s`: of any one phase;
        `drain_timeout_s`: of pausing, if that is more, for running groups end first.
        `bucket_bytes`: 0 for the transport's `BUCKET_BYTES`."""
        self._engines = engines
        self._learner = learner
        self._transport = transport
        self._canary = canary
        self._max_gap = max_gap
        self._timeout_s = timeout_s
        self._drain_timeout_s = max(timeout_s, drain_timeout_s)
        self._workers = workers_per_engine
        self._bucket_bytes = bucket_bytes or BUCKET_BYTES[transport]
        self._members: dict[int, Engine] = {}  # of the open transfer group; empty: none is open
        self._weights: tuple[WeightMeta, ...] = ()

    async def open(self) -> None:
        """Form a new transfer group of the engines there are now. Raises `WeightSyncError`."""
        self._members = {}
        members = dict(self._engines)
        if not members:
            raise WeightSyncError("sync: there is no engine to bring weights to")
        asked = await self._together(
            "preparing a transfer group",
            {"learner": _both(self._learner.transfer_address(), self._learner.weights())},
        )
        (address, port), self._weights = asked["learner"]
        plan = SyncPlan(
            transport=self._transport,
            address=address,
            port=port,
            world_size=1 + len(members) * self._workers,
            bucket_bytes=self._bucket_bytes,
            timeout_s=self._timeout_s,
        )
        joining: dict[str, Awaitable[None]] = {"learner": self._learner.open_transfer(plan)}
        for rank, (index, engine) in enumerate(members.items(), start=1):
            joining[f"engine {index}"] = engine.open_transfer(plan, rank)
        await self._together("joining the transfer group", joining)
        self._members = members

    async def pause(self) -> dict[int, Engine]:
        """Stop all engines until a push; returns them. A push does so itself: call it before an
        update where learner and engines take turns on a GPU."""
        pool = dict(self._engines)
        pausing = {f"engine {i}": pool[i].pause() for i in pool}
        await self._together("pausing", pausing, self._drain_timeout_s)
        return pool

    async def push(self, version: int, step: int) -> Receipt:
        """Bring the learner's weights to all engines as `version`. Raises `WeightSyncError`; then
        no engine serves, and the next push forms a new group."""
        started = time.perf_counter()
        pool = await self.pause()
        if not pool or pool != self._members:
            await self.open()
        members, self._members = self._members, {}  # only a whole push leaves a group to use again
        began = time.perf_counter()
        sent = await self._transfer(members)
        seconds_transfer = time.perf_counter() - began
        gap = await self._prove(members)
        await self._together(
            "resuming", {f"engine {i}": members[i].resume(version) for i in members}
        )
        self._members = members
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

    async def _transfer(self, members: Mapping[int, Engine]) -> Sent:
        """Move all weights; raise where what arrived is not what left."""
        moving: dict[str, Awaitable[Any]] = {
            f"engine {i}": members[i].receive(self._weights) for i in members
        }
        results = await self._together("moving weights", {"learner": self._learner.send()} | moving)
        sent: Sent = results.pop("learner")
        for name, received in results.items():
            if difference := first_difference(sent.digests, received):
                raise WeightSyncError(
                    f"sync: {name} received other weights than the learner sent. {difference}. "
                    "Memory or network of one of the two hosts is broken"
                )
        return sent

    async def _prove(self, members: Mapping[int, Engine]) -> float:
        """Largest |engine - learner| log-prob on the canary, over engines and tokens; nats."""
        groups = await self._together(
            "sampling the canary", {f"engine {i}": members[i].canary(self._canary) for i in members}
        )
        largest = 0.0
        for name, group in groups.items():
            scored = await self._together(
                "scoring the canary", {"learner": self._learner.logprobs(group)}
            )
            gap = logprob_gap(group, scored["learner"])
            if not gap <= self._max_gap:  # also where it is not a number
                raise WeightSyncError(
                    f"sync: all weights arrived at {name}, but on the canary prompt its log-probs "
                    f"are up to {gap:.3g} from the learner's ({self._max_gap:g} is allowed): it "
                    "computes with other weights than it was given, or another way"
                )
            largest = max(largest, gap)
        return largest

    async def _together(
        self, phase: str, calls: Mapping[str, Awaitable[Any]], timeout_s: float = 0.0
    ) -> dict[str, Any]:
        """Await all calls, by who answers. All end, or reach the deadline, before an error is
        raised: a party that is still at work must not be called again."""
        deadline = (timeout_s or self._timeout_s) + _GRACE_S
        answers = await asyncio.gather(
            *(asyncio.wait_for(call, deadline) for call in calls.values()), return_exceptions=True
        )
        results = dict(zip(calls, answers, strict=True))
        failures = {who: it for who, it in results.items() if isinstance(it, BaseException)}
        if not failures:
            return results
        cause = next(iter(failures.values()))
        if isinstance(cause, UserError):
            raise cause
        told = "; ".join(f"{who}: {_reason(it, deadline)}" for who, it in failures.items())
        raise WeightSyncError(f"sync: {phase} failed. {told}") from cause


def first_difference(sent: Mapping[str, str], received: Mapping[str, str]) -> str:
    """The first tensor whose digests differ, and what each side says; empty: all are equal."""
    for name, expected in sent.items():
        if (got := received.get(name, "nothing")) != expected:
            return f"{name}: sent {expected}, received {got}"
    extra = sorted(received.keys() - sent.keys())
    return f"{extra[0]}: received, but never sent" if extra else ""


def logprob_gap(group: Group, logprobs: tuple[tuple[float, ...], ...]) -> float:
    """Largest difference over all tokens of all completions, nats; not a number if one is not.

    `logprobs` is [G][C]."""
    gaps = [
        abs(engine - learner)
        for completion, row in zip(group.completions, logprobs, strict=True)
        for engine, learner in zip(completion.logprobs, row, strict=True)
    ]
    return math.nan if any(map(math.isnan, gaps)) else max(gaps)


def _reason(failure: BaseException, deadline: float) -> str:
    if isinstance(failure, TimeoutError):
        return f"no answer within {deadline:g} s"
    return str(failure) or type(failure).__name__


async def _both(first: Awaitable[Any], second: Awaitable[Any]) -> tuple[Any, Any]:
    """One after the other: a learner's calls never overlap."""
    return await first, await second
