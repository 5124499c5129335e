"""A sync against a raw broadcast of as many bytes: real engines, real ranks, digests on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from medrl.actors.pool import EnginePool
from medrl.actors.wire import num_bytes
from medrl.bench.frame import Benchmark, Case, Options, Target, paired
from medrl.bench.pushes import Pushes
from medrl.bench.raw_broadcast import Broadcasts, broadcasts
from medrl.bench.records import ROOT
from medrl.bench.shapes import SIZES
from medrl.cluster.engines import Engines
from medrl.cluster.interrupt import Interrupt
from medrl.cluster.placement import Placement, cluster, placed
from medrl.cluster.preflight import Checked, check_inputs
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

RANKS = {0: 1, 3: 2}  # learner ranks, by ZeRO stage: one alone would have nothing to gather
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

    @property
    def most_engines(self) -> int:
        return max(map(max, self.engines.values()))


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
        engines={0: (2,)},
        targets={},
    ),
    Model(
        size="125 MB",
        folder=_make("medium", SIZES),
        engines={0: (1, 2, 4), 3: (1, 2)},
        targets={0: 0.5, 3: 0.3},
    ),
    Model(
        size="1 GB",
        folder=_make("large", LARGE),
        engines={0: (1,), 3: (1,)},  # 18 GiB; two engines and two ranks fill 24
        targets={0: 0.65, 3: 0.4},
    ),
)


def case_name(model: Model, stage: int, engines: int) -> str:
    return f"{model.size}, ZeRO {stage}, {engines} engine{'s' * (engines > 1)}"


def measure(options: Options) -> list[Case]:
    folder = options.folder.absolute()
    data = folder / "phantoms-84"
    if not data.exists():
        phantoms.generate(data, train=64, test=32, seed=0)
    cases: list[Case] = []
    for model in MODELS[:1] if options.short else MODELS:
        with TemporaryDirectory() as runs:
            config = _config(model.folder(folder), data / "train", runs, model.most_engines)
            cases += asyncio.run(_of_model(model, config, options.pairs))
    return cases


def _config(model: Path, data: Path, runs: str, engines: int) -> Config:
    ranks = max(RANKS.values())
    return Config(
        run=RunConfig(name="sync", dir=runs),
        model=ModelConfig(path=str(model)),
        data=DataConfig(train=str(data)),
        rollout=RolloutConfig(max_tokens=8, max_model_len=256),
        learner=LearnerConfig(learning_rate=1e-4, schedule="constant"),
        placement=PlacementConfig(
            engines=engines, learners=ranks, device="cpu", cpus_per_process=0.1
        ),
    )


def _with_zero(config: Config, stage: int) -> Config:
    learner = config.learner.model_copy(update={"zero_stage": stage})
    placement = config.placement.model_copy(update={"learners": RANKS[stage]})
    return config.model_copy(update={"learner": learner, "placement": placement})


async def _of_model(model: Model, config: Config, pairs: int) -> list[Case]:
    """Engines are started once, learner ranks once a ZeRO stage."""
    config.run_dir.mkdir()
    checked = check_inputs(config, config.model.path)
    requests = requests_of(config, checked.train)
    cases = []
    with cluster(config.placement):
        async with placed(config) as placement, _engines(config, checked, placement) as pool:
            for stage, numbers in model.engines.items():
                own = _with_zero(config, stage)
                settings = {"learner ranks": RANKS[stage], "threads": placement.threads}
                async with system(own, checked, placement, requests, Interrupt(), pool) as parts:
                    for engines in numbers:
                        name = case_name(model, stage, engines)
                        pushes = Pushes(parts.learner, _first(pool, engines), requests)
                        moving = broadcasts(
                            sum(map(num_bytes, await parts.learner.weights())),
                            BUCKET_BYTES["gloo"],
                            receivers=engines,
                            options=placement.reward_options(),
                        )
                        async with moving as raw:
                            cases.append(await _case(name, pushes, raw, settings, pairs))
    return cases


@asynccontextmanager
async def _engines(
    config: Config, checked: Checked, placement: Placement
) -> AsyncIterator[EnginePool]:
    engines = Engines(config, checked, placement, config.model.path)
    try:
        yield await engines.start()
    finally:
        await engines.close()


def _first(pool: EnginePool, engines: int) -> EnginePool:
    """A pool of some of its engines."""
    some = EnginePool()
    for index, engine in islice(pool.up.items(), engines):
        some.add(index, engine)
    return some


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
        "Seconds to move a new version of all weights over gloo, on one machine. Ours: a push as "
        "every step makes it, between real learner ranks and real engines, from the first call to "
        "the last answer: gathered (ZeRO 3, over two ranks), packed, loaded by vLLM, with digests "
        "on both sides. Raw: one contiguous buffer of as many bytes, in pieces of a bucket's size, "
        "to as many processes that do nothing with it. Before every push the learner makes a step "
        "that changes all tensors; and all of the raw buffer changes. "
        f"{PAUSE}: how long the engines generate nothing, from pausing to resuming, the canary "
        "included. Ours takes longer mostly for vLLM's loading, tensor by tensor in Python, and "
        "its packing of linear layers for oneDNN, which alone moves 2 to 3 GB/s a core: no more "
        "than the raw broadcast of all of it. More processes are at work than there are cores. "
        "1 GB to two engines from two ranks does not fit into 24 GiB."
    ),
    measure=measure,
    targets=tuple(
        Target(case=case_name(model, stage, engines), at_least=least)
        for model in MODELS
        for stage, least in model.targets.items()
        for engines in model.engines[stage]
    ),
    checked=False,  # engines and ranks alone take a minute to start
)
