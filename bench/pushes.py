"""Pushes of new versions to engines, one after the other, and what shows that they were."""

from __future__ import annotations

from itertools import pairwise
from unittest.mock import patch

from medrl.actors.pool import EnginePool
from medrl.actors.types import Receipt, Sent
from medrl.bench.facts import Count, Fact, Gradients, Moved
from medrl.cluster.requests import Requests
from medrl.cluster.sync import MAX_GAP, Sync
from medrl.learner.learner import Learner

_TIMEOUT_S = 120.0  # of any one phase of a sync


class Pushes:
    """A learner's, to all engines of a pool; weights are float32 and travel over gloo."""

    def __init__(
        self, learner: Learner, pool: EnginePool, requests: Requests, *, share_memory: bool = True
    ) -> None:
        self.engines = len(pool.up)
        self.receipts: list[Receipt] = []
        self._learner, self._requests = learner, requests
        self._sync = Sync(
            pool=pool,
            learner=learner,
            transport="gloo",
            canary=requests.canary(),
            max_gap=MAX_GAP["float32"],
            timeout_s=_TIMEOUT_S,
            share_memory=share_memory,
        )
        self._sent: list[Sent] = []
        self._norms: list[float] = []

    async def once(self) -> float:
        """Seconds in which the weights of a new version moved, with digests and loading."""
        step = len(self.receipts)
        batch = [self._requests.example(2 * step + i) for i in range(2)]  # one a rank
        self._norms.append((await self._learner.imitate(batch)).gradient_norm)
        send = self._learner.send

        async def noted() -> Sent:
            self._sent.append(await send())
            return self._sent[-1]

        with patch.object(self._learner, "send", noted):
            self.receipts.append(await self._sync.push(version=step, step=step))
        return self.receipts[-1].seconds_transfer

    def facts(self) -> tuple[Fact, ...]:
        """Digests of the engines were those of the learner, or there would be no receipt."""
        proven = sum(one.engines for one in self.receipts)
        moved = (
            Moved(whose="sync", bytes=receipt.bytes, before=old.digests, after=new.digests)
            for receipt, (old, new) in zip(self.receipts[1:], pairwise(self._sent), strict=True)
        )
        return (
            Gradients(whose="learner", norms=tuple(self._norms)),
            Count(what="engines synced", asked=self.engines * len(self.receipts), done=proven),
            *moved,
        )
