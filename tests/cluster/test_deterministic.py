"""`run.deterministic` without engines: what engines round by company, the sampler keeps apart."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from fake_runs import World

from medrl.actors.fake_engine import FakeEngine
from medrl.actors.types import Group, RolloutRequest
from medrl.cluster.engines import make_sampler
from medrl.configs.errors import EngineError, as_death
from medrl.configs.schema import Config, DataConfig, ModelConfig, RunConfig

STEPS = 6


class Rounding(FakeEngine):
    """Its log-probs depend in the last bits on how many groups it has; takes any time for them."""

    rng = random.Random(0)
    dies_at = -1  # engine 1 is dead from this draw on; -1: never

    async def generate(self, request: RolloutRequest) -> Group:
        if self._index == 1 and 0 <= self.dies_at <= request.draw:
            raise as_death(EngineError("engine 1 died"))
        self._seconds = self.rng.choice((0.0, 0.0, 0.001, 0.003))
        group = await super().generate(request)
        company = self._running
        completions = tuple(
            replace(one, logprobs=(one.logprobs[0] - 1e-7 * company, *one.logprobs[1:]))
            for one in group.completions
        )
        return replace(group, completions=completions)


async def run(folder: Path, *, deterministic: bool, seed: int, dies_at: int = -1) -> Any:
    """What was sampled, by step, of a run whose engines take other times with each seed."""
    kind = type("Rounding", (Rounding,), {"rng": random.Random(seed), "dies_at": dies_at})
    world = World(folder, steps=STEPS, delays=(0.0, 0.0, 0.0), kind=kind)
    config = Config(
        run=RunConfig(name="run", deterministic=deterministic),
        model=ModelConfig(path="model"),
        data=DataConfig(train="prompts"),
    )
    world.parts = replace(world.parts, sampler=make_sampler(config, world.pool))
    await world.run()
    columns = ["draw", "token_ids", "logprobs", "advantage"]
    files = sorted((folder / "completions").glob("*.parquet"))
    return [pq.read_table(file, columns=columns).to_pylist() for file in files]


async def test_what_is_sampled_follows_from_no_timing(tmp_path: Path) -> None:
    """Nor from which engine is asked, or dies: its groups are asked again of another."""
    runs = [
        await run(tmp_path / str(seed), deterministic=True, seed=seed, dies_at=dies_at)
        for seed, dies_at in ((0, -1), (1, -1), (2, 5), (3, 9), (4, 1))
    ]
    assert len(runs[0]) == STEPS
    assert all(other == runs[0] for other in runs[1:])


async def test_without_it_timing_shows(tmp_path: Path) -> None:
    """So the test above can fail."""
    runs = [await run(tmp_path / str(seed), deterministic=False, seed=seed) for seed in (0, 1)]
    assert runs[0] != runs[1]
