"""The driver's handle of an engine: deadlines, and errors that say which engine and why."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from reference import request

from medrl.actors.actor import RayEngine
from medrl.configs.errors import EngineError, UserError, as_death

pytestmark = pytest.mark.engines


def shell_class() -> type:
    """A class of a function travels by value: Ray's workers cannot import tests."""

    class Shell:
        """Stands where `EngineActor` does; each method fails in its own way."""

        async def generate(self, asked: object) -> None:
            raise UserError("prompt 7 is too long")

        async def ping(self) -> None:
            raise as_death(EngineError("engine 3: vLLM's process died"))

        async def pause(self) -> None:
            await asyncio.sleep(600)

        async def resume(self, version: int) -> None:
            raise ValueError("no such version")

        async def canary(self, asked: object) -> None:
            os._exit(1)

        async def close(self) -> None:
            await asyncio.sleep(600)

    return Shell


@pytest.fixture(scope="module")
def shell() -> Iterator[Any]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield ray.remote(shell_class()).options(num_cpus=0)
    ray.shutdown()


async def test_errors_cross_ray_with_the_engines_number(
    shell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medrl.actors.actor._CLOSE_S", 0.5)
    actor = shell.remote()
    engine = RayEngine(actor, 3, group_timeout_s=30.0, timeout_s=30.0)
    with pytest.raises(UserError, match=r"^prompt 7 is too long$"):
        await engine.generate(request())
    with pytest.raises(EngineError, match=r"engine 3 failed \(resume\): no such version") as caught:
        await engine.resume(1)
    assert not caught.value.died
    with pytest.raises(EngineError, match="vLLM's process died") as caught:
        await engine.ping()
    assert caught.value.died  # said in the actor, and still so here
    hasty = RayEngine(actor, 3, group_timeout_s=0.2, timeout_s=0.2)
    with pytest.raises(EngineError, match=r"engine 3 did not pause within 0\.2 s") as caught:
        await hasty.pause()
    assert caught.value.died
    with pytest.raises(EngineError, match=r"engine 3 died \(sample the canary\)") as caught:
        await engine.canary(request())
    assert caught.value.died
    with pytest.raises(EngineError, match=r"engine 3 died \(resume\)"):
        await engine.resume(1)
    await engine.close()
    await engine.close()


async def test_an_engine_that_does_not_answer_is_closed_all_the_same(
    shell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medrl.actors.actor._CLOSE_S", 0.5)
    engine = RayEngine(shell.remote(), 0, group_timeout_s=30.0, timeout_s=30.0)
    await engine.close()
    with pytest.raises(EngineError, match=r"engine 0 died \(resume\)"):
        await engine.resume(1)


async def test_rays_own_failures_become_the_engines() -> None:
    async def lost() -> None:
        raise ray.exceptions.OutOfMemoryError("killed for memory")

    engine = RayEngine(None, 3, group_timeout_s=30.0, timeout_s=30.0)
    with pytest.raises(EngineError, match=r"engine 3 failed \(generate\): .*memory"):
        await engine.answer("generate", lost, 5.0)
