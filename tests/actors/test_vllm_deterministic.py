"""The deterministic engine: what else it is asked, and in which order, changes no bit."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from reference import LONG, MAX_PIXELS, draw_images, request

from medrl.actors.types import Group
from medrl.actors.vllm_engine import VllmEngine
from medrl.configs.schema import ModelConfig, RolloutConfig
from medrl.learner import tiny

pytestmark = pytest.mark.engines

HIDDEN = 768
"""So wide that the CPU's product of one row adds up in another order than that of several; a
narrower model's bits are the same in any company."""


async def test_a_group_follows_from_the_weights_and_its_request_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.build("qwen2_vl", tmp_path / "model", corpus=[LONG], hidden=HIDDEN)
    draw_images(tmp_path)
    engine = VllmEngine(
        model=ModelConfig(path=str(tmp_path / "model")),
        rollout=RolloutConfig(max_model_len=512),
        max_pixels=MAX_PIXELS,
        image_root=tmp_path,
        index=0,
        device="cpu",
        seed=0,
        transport="gloo",
        deterministic=True,
    )
    # Of one completion each: alone it makes products of one row.
    asked = [request((f"{i % 4}.png",), n=1, max_tokens=24, seed=i) for i in range(8)]

    async def at_once() -> Sequence[Group]:
        return await asyncio.gather(*map(engine.generate, asked))

    try:
        await engine.resume(0)
        one_by_one = [await engine.generate(one) for one in asked]
        backwards = [await engine.generate(one) for one in reversed(asked)]
        crowded = await at_once()
        monkeypatch.setattr(engine, "_alone", None)
        loose = await at_once()
    finally:
        await engine.close()
    assert bits(crowded) == bits(one_by_one) == bits(backwards[::-1])
    assert bits(loose) != bits(crowded)  # what the mode is for


def bits(groups: Sequence[Group]) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    return [(one.token_ids, one.logprobs) for group in groups for one in group.completions]
