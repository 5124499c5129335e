"""One real engine at a time, beside transformers' model of the same folder, for a whole session."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from builders import pool_of
from reference import LONG, MAX_PIXELS, Reference, draw_images, request

from medrl.actors.types import Group, Receipt, RolloutRequest
from medrl.actors.vllm_engine import VllmEngine
from medrl.cluster.sync import Sync
from medrl.configs.schema import ModelConfig, RolloutConfig
from medrl.learner import tiny

TIED = {"qwen2_vl": True, "qwen2_5_vl": False, "qwen3_vl": True}
DEFAULTS = {"do_sample": True, "top_k": 1, "temperature": 0.01, "repetition_penalty": 5.0}
MAX_MODEL_LEN = 512


class Engine(VllmEngine):
    """As shipped, unless a test takes the mend of stale caches out."""

    clears_caches = True

    async def _stop_and_clear(self) -> None:
        if self.clears_caches:
            await super()._stop_and_clear()
        else:
            await self._llm.pause_generation(mode="wait", clear_cache=False)

    async def set_head_repacking(self, on: bool) -> None:
        """Take the renewal of the head's packed copy out, in vLLM's worker, or put it back."""

        def switch(worker: object) -> None:
            from medrl.actors import loaders

            shipped = loaders.__dict__.setdefault("shipped", loaders.pack_kept)
            loaders.pack_kept = shipped if on else lambda model: None

        await self._llm.collective_rpc(switch)


class Live:
    """An engine, what it is compared with, and the sync that joins them."""

    def __init__(self, family: str, folder: Path, images: Path) -> None:
        self.family, self.folder = family, folder
        self.image_names = draw_images(images)
        self.reference = Reference(folder, images)
        self.engine = Engine(
            model=ModelConfig(path=str(folder)),
            rollout=RolloutConfig(max_model_len=MAX_MODEL_LEN),
            max_pixels=MAX_PIXELS,
            image_root=images,
            index=0,
            device="cpu",
            seed=0,
            transport="gloo",
            max_images=2,
            log_path=images / "vllm.log",
        )
        self.version = -1
        self.sync = self.new_sync()
        self._start = {
            name: value.clone() for name, value in self.reference.model.state_dict().items()
        }

    def new_sync(self, *, timeout_s: float = 30.0, bucket_bytes: int = 0) -> Sync:
        return Sync(
            pool=pool_of([self.engine], serving=False),
            learner=self.reference,  # type: ignore[arg-type]
            transport="gloo",
            canary=request(n=1, temperature=0.0),
            max_gap=1e-4,
            timeout_s=timeout_s,
            bucket_bytes=bucket_bytes,
        )

    async def push(self) -> Receipt:
        self.version += 1
        return await self.sync.push(self.version, self.version)

    async def restart(self) -> None:
        """Both sides as the folder has them, nothing left over from the test before."""
        self.engine.clears_caches = True
        await self.engine.set_head_repacking(True)
        self.reference.model.load_state_dict(self._start)
        await self.push()

    def gap(self, group: Group) -> float:
        """Largest |engine - transformers| log-prob over the group's tokens, nats."""
        pairs = zip(group.completions, self.reference.forward_logprobs(group), strict=True)
        return max(
            abs(engine - plain)
            for completion, row in pairs
            for engine, plain in zip(completion.logprobs, row, strict=True)
        )

    async def generate(self, asked: RolloutRequest) -> Group:
        return await self.engine.generate(asked)


@pytest_asyncio.fixture(scope="session", loop_scope="session", params=tiny.FAMILIES)
async def started(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Live]:
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # lets `set_head_repacking` reach in
    family: tiny.Family = request.param
    folder = tmp_path_factory.mktemp(family)
    tiny.build(family, folder, corpus=[LONG], tied=TIED[family])
    (folder / "generation_config.json").write_text(json.dumps(DEFAULTS))
    live = Live(family, folder, tmp_path_factory.mktemp("images"))
    yield live
    await live.engine.close()


@pytest_asyncio.fixture(loop_scope="session")
async def live(started: Live) -> Live:
    await started.restart()
    return started
