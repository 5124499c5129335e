"""A sync against a raw broadcast of as many bytes: real engines, real ranks, digests on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from medrl.actors.wire import num_bytes
from medrl.bench.frame import Benchmark, Case, Options, Target, paired
from medrl.bench.pushes import Pushes
from medrl.bench.raw_broadcast import Broadcasts, broadcasts
from medrl.bench.records import ROOT
from medrl.bench.shapes import SIZES
from medrl.cluster.interrupt import Interrupt
from medrl.cluster.placement import cluster, placed
from medrl.cluster.preflight import check_inputs
from medrl.cluster.requests import requests_of
from medrl.cluster.start import system
from medrl.cluster.sync import BUCKET_BYTES
from medrl.configs.schema import (
    Config,
    DataConfig,
    LearnerConfig,
    ModelConfig,
    PlacementConfig,
    RolloutConfig,
    RunConfig,
)
from medrl.data import phantoms
from medrl.learner import tiny

RANKS = {0: 1, 2: 2, 3: 2}  # learner ranks, by ZeRO stage: one alone would have nothing to share
LARGE: dict[str, Any] = {"hidden": 1024, "layers": 19, "vision_hidden": 256, "vision_layers": 6}
"""Of `learner.tiny.build`: 250 million parameters."""

PAUSE, SPEED, RAW_SPEED = "pause s", "GB/s", "GB/s raw"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is moved, and to how many engines."""

    size: str
    folder: Callable[[Path], Path]  # in a folder, where it is made once
    engines: Mapping[int, tuple[int, ...]]  # by ZeRO stage
    targets: Mapping[int, float]  # of the ratio, likewise
    apart: tuple[int, ...] = ()  # engines to which it is moved by broadcasts too, at ZeRO 0


def _make(name: str, sizes: Mapping[str, Any]) -> Callable[[Path], Path]:
    """A random model; unlike `shapes.make_model`'s its texts end, so that it can be trained."""

    def made_in(folder: Path) -> Path:
        path = folder / name
        if not (path / "config.json").exists():
            tiny.build("qwen2_vl", path, corpus=phantoms.texts(), **sizes)
        return path

    return made_in


MODELS = (
    Model(
        size="4 MB",
        folder=lambda folder: ROOT / "starter",
        engines={0: (1, 2, 4), 3: (1, 2, 4)},
        targets={},
    ),
    Model(
        size="125 MB",
        folder=_make("medium", SIZES),
        engines={0: (1, 2, 4), 2: (1, 2, 4), 3: (1, 2, 4)},
        targets={0: 0.5, 2: 0.5, 3: 0.3},
        apart=(1, 2),
    ),
    Model(
        size="1 GB",
        folder=_make("large", LARGE),
        engines={0: (1, 2), 2: (1,), 3: (1,)},  # two engines and two ranks do not fit into 24 GiB
        targets={0: 0.65, 2: 0.65, 3: 0.4},
    ),
)


def case_name(model: Model, stage: int, engines: int, *, apart: bool = False) -> str:
    name = f"{model.size}, ZeRO {stage}, {engines} engine{'s' * (engines > 1)}"
    return f"{name}, as between machines" if apart else name


def measure(options: Options) -> Iterator[Case]:
    folder = options.folder.absolute()
    data = folder / "phantoms-84"
    if not data.exists():
        phantoms.generate(data, train=64, test=32, seed=0)
    for model in MODELS[:1] if options.short else MODELS:
        path = model.folder(folder)
        for stage, numbers in model.engines.items():
            for engines in numbers:
                with TemporaryDirectory() as runs:
                    config = _config(path, data / "train", runs, stage, engines)
                    yield from asyncio.run(_of_run(model, config, options.pairs))


def _config(model: Path, data: Path, runs: str, stage: int, engines: int) -> Config:
    return Config(
        run=RunConfig(name="sync", dir=runs),
        model=ModelConfig(path=str(model)),
        data=DataConfig(train=str(data)),
        rollout=RolloutConfig(max_tokens=8, max_model_len=256),
        learner=LearnerConfig(learning_rate=1e-4, schedule="constant", zero_stage=stage),
        placement=PlacementConfig(
            engines=engines, learners=RANKS[stage], device="cpu", cpus_per_process=0.1
        ),
    )


async def _of_run(model: Model, config: Config, pairs: int) -> list[Case]:
    """Engines and ranks as a run with so many of them has them."""
    config.run_dir.mkdir()
    checked = check_inputs(config, config.model.path)
    requests = requests_of(config, checked.train)
    stage, engines = config.learner.zero_stage, config.placement.max_engines
    ways = [False, True] if stage == 0 and engines in model.apart else [False]
    cases = []
    with cluster(config.placement):
        async with (
            placed(config) as placement,
            system(config, checked, placement, requests, Interrupt()) as parts,
        ):
            weights = await parts.learner.weights()
            settings = {
                "learner ranks": RANKS[stage],
                "threads a rank": placement.rank_threads,
                "threads an engine": placement.engine_threads,
            }
            for apart in ways:
                pushes = Pushes(parts.learner, parts.pool, requests, share_memory=not apart)
                moving = broadcasts(
                    sum(map(num_bytes, weights)),
                    receivers=engines,
                    options=placement.reward_options(),
                )
                async with moving as raw:
                    name = case_name(model, stage, engines, apart=apart)
                    cases.append(await _case(name, pushes, raw, settings, pairs))
    return cases


async def _case(
    name: str, pushes: Pushes, raw: Broadcasts, settings: Mapping[str, object], pairs: int
) -> Case:
    """Both sides in turns. The first run of each, uncounted, opens its connections."""
    loop = asyncio.get_running_loop()

    def side(once: Callable[[], Coroutine[Any, Any, float]]) -> Callable[[], float]:
        return lambda: asyncio.run_coroutine_threadsafe(once(), loop).result()

    ours, other = await asyncio.to_thread(paired, side(pushes.once), side(raw.once), pairs)
    measured = pushes.receipts[1:]
    return Case(
        name=name,
        ours=ours,
        other=other,
        unit="s",
        facts=(*pushes.facts(), *raw.facts()),
        settings={
            "MB": round(measured[0].bytes / 1e6, 1),
            "tensors": measured[0].tensors,
            "bucket MiB": BUCKET_BYTES["gloo"] // 2**20,
            **settings,
        },
        numbers={
            PAUSE: median(one.seconds for one in measured),
            SPEED: measured[0].bytes / median(ours) / 1e9,
            RAW_SPEED: measured[0].bytes / median(other) / 1e9,
        },
    )


BENCHMARK = Benchmark(
    name="sync",
    title="Weights to the engines",
    ours="sync",
    other="raw broadcast",
    text=(
        "Seconds to move a new version of all weights on one machine. Ours: a push as "
        "every step makes it, between real learner ranks and real engines, from the first call to "
        "the last answer, with digests on both sides. On one machine engines read the learner's "
        "weights where they lie (ZeRO 0 to 2), or where its ranks put what they have of them "
        "(ZeRO 3); `as between machines` both get broadcasts over gloo. "
        "Raw: a broadcast over gloo of one contiguous buffer of as many bytes, in pieces of "
        "64 MiB, to as many processes that do nothing with it. "
        "Before every push the learner makes a step that changes all tensors; and all of the raw "
        "buffer changes. "
        f"{PAUSE}: how long the engines generate nothing, from pausing to resuming, the canary "
        "included. Most of an engine's time is its packing of linear layers for oneDNN, 2 to "
        "3 GB/s a core, and 0.3 to 0.6 ms a layer in which that chooses a layout. More processes "
        "are at work than there are cores: a raw broadcast to one process has a core for each end. "
        "1 GB to two engines from two ranks does not fit into 24 GiB."
    ),
    measure=measure,
    targets=tuple(
        Target(case=case_name(model, stage, engines), at_least=least)
        for model in MODELS
        for stage, least in model.targets.items()
        for engines in model.engines[stage]
    )
    + tuple(
        Target(case=case_name(model, 0, engines, apart=True), at_least=model.targets[0])
        for model in MODELS
        for engines in model.apart
    ),
    checked=False,  # engines and ranks alone take a minute to start
)
