"""An engine in a Ray process, and the handle that stands for it on the driver."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from medrl.actors.engine import Engine
from medrl.actors.types import Group, RolloutRequest, SyncPlan, WeightMeta
from medrl.configs.errors import EngineError, MedrlError, as_death

_NODE_GONE = "its node has died"  # Ray has no other name for it
_GRACE_S = 2.0  # on top of a collective's own deadline, whose error says more
_WHY = {
    _NODE_GONE: "; its node has left",
    "placement group was removed": "; its room was given to a learner rank",
    "Worker exit type: SYSTEM_ERROR": "; often it was killed for lack of memory",
}
_CLOSE_S = 6.0  # for vLLM to end its processes; then the actor is killed


class EngineActor:
    """Shell of `VllmEngine` in a Ray process; built by `create_engine`."""

    _engine: Engine

    async def start(self, settings: Mapping[str, Any]) -> None:
        from medrl.actors.vllm_engine import VllmEngine

        self._engine = VllmEngine(**settings)

    async def generate(self, request: RolloutRequest) -> Group:
        return await self._engine.generate(request)

    async def ping(self) -> None:
        await self._engine.ping()

    async def pause(self) -> None:
        await self._engine.pause()

    async def open_transfer(self, plan: SyncPlan, rank: int) -> None:
        await self._engine.open_transfer(plan, rank)

    async def receive(self, weights: Sequence[WeightMeta]) -> Mapping[str, str]:
        return await self._engine.receive(weights)

    async def canary(self, request: RolloutRequest) -> Group:
        return await self._engine.canary(request)

    async def resume(self, version: int) -> None:
        await self._engine.resume(version)

    async def close(self) -> None:
        await self._engine.close()


def death(error: RayActorError) -> str:
    """Ray's account of a dead actor in one sentence: it prints a page."""
    first, _, rest = str(error).partition("\n")
    told = next((why for sign, why in _WHY.items() if sign in rest), "")
    return first.partition(": RpcError")[0].rstrip(". ") + told


async def in_place(make: Callable[[], Any]) -> Any:
    """The Ray actor that `make` asks for, once it runs; to find room for it may take for ever.

    Ray takes some 15 s to notice that a node is gone. An actor that it sends there meanwhile never
    runs, and ends when Ray does notice: then another is asked for."""
    while True:
        actor = make()
        try:
            await actor.__ray_ready__.remote()
            return actor
        except RayActorError as error:
            ray.kill(actor)
            if _NODE_GONE not in str(error) and not isinstance(error, ActorUnavailableError):
                raise
        except BaseException:
            ray.kill(actor)
            raise


async def create_engine(
    *,
    options: Mapping[str, Any],
    timeout_s: float,
    call_timeout_s: float,
    room_timeout_s: float | None = None,
    on_created: Callable[[RayEngine], object] = lambda engine: None,
    **settings: Any,
) -> RayEngine:
    """Start a `VllmEngine(**settings)` as a Ray actor with `options`; returns when it is up.

    `on_created` gets the handle before that, so that the caller can end an engine that does not
    come up. Raises `EngineError`, also where there is no room within `room_timeout_s` (None: for
    ever), or it is not up within `timeout_s` of having room.
    """
    index: int = settings["index"]
    try:
        async with asyncio.timeout(room_timeout_s):
            actor = await in_place(lambda: ray.remote(EngineActor).options(**options).remote())
    except TimeoutError:
        text = f"no room for engine {index} within {room_timeout_s:g} s"
        raise as_death(EngineError(text)) from None
    except RayError as error:  # an environment that is not made
        raise as_death(EngineError(f"engine {index} cannot be started: {error}")) from error
    engine = RayEngine(actor, index, settings["rollout"].timeout_s, call_timeout_s)
    on_created(engine)
    await engine.answer("start", actor.start.remote, timeout_s, settings)
    return engine


class RayEngine:
    """Obeys `actors.engine.Engine` over an `EngineActor`; no call waits without a deadline."""

    def __init__(self, actor: Any, index: int, group_timeout_s: float, timeout_s: float) -> None:
        self._actor = actor
        self.index = index
        self._group_timeout_s = group_timeout_s
        self._timeout_s = timeout_s

    async def generate(self, request: RolloutRequest) -> Group:
        """A paused engine keeps its callers waiting, so a sync's time is on top of a group's."""
        limit = self._group_timeout_s + self._timeout_s
        group: Group = await self.answer("generate", self._actor.generate.remote, limit, request)
        return group

    async def ping(self) -> None:
        await self.answer("answer a ping", self._actor.ping.remote, self._timeout_s)

    async def pause(self) -> None:
        await self.answer("pause", self._actor.pause.remote, self._group_timeout_s)

    async def open_transfer(self, plan: SyncPlan, rank: int) -> None:
        await self.answer(
            "join a transfer",
            self._actor.open_transfer.remote,
            self._timeout_s + _GRACE_S,
            plan,
            rank,
        )

    async def receive(self, weights: Sequence[WeightMeta]) -> Mapping[str, str]:
        received: Mapping[str, str] = await self.answer(
            "receive weights", self._actor.receive.remote, self._timeout_s + _GRACE_S, weights
        )
        return received

    async def canary(self, request: RolloutRequest) -> Group:
        group: Group = await self.answer(
            "sample the canary", self._actor.canary.remote, self._timeout_s, request
        )
        return group

    async def resume(self, version: int) -> None:
        await self.answer("resume", self._actor.resume.remote, self._timeout_s, version)

    async def close(self) -> None:
        with contextlib.suppress(RayError, MedrlError):  # it may be dead, or hang: killed below
            await self.answer("close", self._actor.close.remote, _CLOSE_S)
        ray.kill(self._actor)

    async def answer(
        self, what: str, call: Callable[..., Awaitable[Any]], timeout_s: float, *arguments: Any
    ) -> Any:
        """Call a method of the actor and wait for what it returns, at most `timeout_s`. Whatever is
        not an error that the engine itself raised is told as its death."""
        try:
            async with asyncio.timeout(timeout_s):
                return await call(*arguments)
        except TimeoutError:
            text = f"engine {self.index} did not {what} within {timeout_s:g} s"
            raise as_death(EngineError(text)) from None
        except RayActorError as error:
            text = f"engine {self.index} died ({what}): {death(error)}"
            raise as_death(EngineError(text)) from error
        except RayTaskError as error:
            if isinstance(error.cause, MedrlError):
                raise error.cause from None
            raise EngineError(f"engine {self.index} failed ({what}): {error.cause}") from error
        except RayError as error:  # out of memory, a lost object, an environment that is not made
            text = f"engine {self.index} failed ({what}): {error}"
            raise as_death(EngineError(text)) from error
