"""The seam between the system and whatever generates. Standard library only.

The real one is `actors.vllm_engine`; `actors.fake_engine` obeys the same protocol in plain Python.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from medrl.actors.types import Group, RolloutRequest, SyncPlan, WeightMeta


class Engine(Protocol):
    """Generates groups, and takes new weights between `pause` and `resume`.

    Order of a sync: pause, receive, canary, resume. An engine serves only the version it was last
    given by `resume`; `generate` on a paused engine waits.
    """

    async def generate(self, request: RolloutRequest) -> Group:
        """Sample one group. Raises `UserError` for a prompt too long for the model (never cut),
        `EngineError` for anything else; `died` says whether another engine may do better."""
        ...

    async def ping(self) -> None:
        """Answer, where it could generate. Raises `EngineError`."""
        ...

    async def pause(self) -> None:
        """Stop serving: running requests end first. Clear prefix, image and encoder caches."""
        ...

    async def open_transfer(self, plan: SyncPlan, rank: int) -> None:
        """Join the transfer group as `rank` (1..N; 0 is the learner). Needs the other side."""
        ...

    async def receive(self, weights: Sequence[WeightMeta]) -> Mapping[str, str]:
        """Take all `weights`, in order; returns each tensor's digest as it arrived."""
        ...

    async def canary(self, request: RolloutRequest) -> Group:
        """Sample one group although paused, with caches as `resume` would find them."""
        ...

    async def resume(self, version: int) -> None:
        """Serve again, as `version`."""
        ...

    async def close(self) -> None:
        """Free everything; safe to call twice."""
        ...
