"""A whole training step, here and in TRL, on the same machine, model and data."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq

from medrl.bench.facts import Equal, Fact, Gradients, Lengths
from medrl.bench.frame import Benchmark, Case, Options, Target, paired
from medrl.bench.live_run import LiveRun, live_run
from medrl.bench.shapes import NOTHINK, SHAPES, SIDE, THINK, make_model
from medrl.bench.trl_process import TrlProcess
from medrl.configs.loader import config_of
from medrl.configs.schema import Config

PROMPTS = 4
RECOMPUTES = "{}, TRL as it comes"
"""TRL recomputes activations unless told not to, which saves memory that is not wanted here."""


def measure(options: Options) -> list[Case]:
    return [
        case
        for shape in ((NOTHINK,) if options.short else (THINK, NOTHINK))
        for case in asyncio.run(_cases(shape, options))
    ]


async def _cases(shape: str, options: Options) -> list[Case]:
    """Both systems are up all the while, and work in turns; one that waits is idle."""
    ways = {shape: False} | ({RECOMPUTES.format(shape): True} if shape == THINK else {})
    with TemporaryDirectory() as folder:
        config = make_config(options.folder.absolute(), Path(folder), SHAPES[shape].tokens)
        async with live_run(config) as run:
            same = await _same_loss(run, Path(folder))
            return [
                await _case(name, run, same, options.pairs, Path(folder), checkpointing)
                for name, checkpointing in ways.items()
            ]


@dataclass(frozen=True, slots=True)
class Seen:
    """Of each counted step."""

    lines: list[Mapping[str, Any]] = field(default_factory=list)  # ours: of metrics.jsonl
    theirs: list[Mapping[str, Any]] = field(default_factory=list)


async def _case(
    name: str,
    run: LiveRun,
    same: tuple[Fact, ...],
    pairs: int,
    folder: Path,
    checkpointing: bool,
) -> Case:
    loop = asyncio.get_running_loop()
    seen = Seen()
    tokens = run.config.rollout.max_tokens

    def ours() -> float:
        line = asyncio.run_coroutine_threadsafe(run.step(), loop).result()
        seen.lines.append(line)
        return float(line["seconds.step"])

    def measured() -> tuple[tuple[float, ...], tuple[float, ...]]:
        trl = TrlProcess(run.config, folder / "trl")
        with trl.running():
            trl.begin(checkpointing=checkpointing)

            def other() -> float:
                seen.theirs.append(trl.step())
                return float(seen.theirs[-1]["seconds"])

            return paired(ours, other, pairs)

    costs, others = await asyncio.to_thread(measured)
    completions = PROMPTS * run.config.rollout.completions
    parts = ("rollout", "learn", "sync")
    return Case(
        name=name,
        ours=costs,
        other=others,
        unit="s a step",
        facts=(
            *same,
            Gradients(whose="ours", norms=_all(seen.lines, "gradient_norm")),
            Gradients(whose="TRL", norms=_all(seen.theirs, "gradient_norm")),
            Lengths(whose="ours", asked=tokens, found=_lengths(seen.lines)),
            Lengths(
                whose="TRL", asked=tokens, found=tuple(int(it["shortest"]) for it in seen.theirs)
            ),
        ),
        settings={
            "prompts": PROMPTS,
            "G": run.config.rollout.completions,
            "C": tokens,
            "image": SIDE,
            "engines": run.config.placement.engines,
            "learner ranks": run.config.placement.learners,
            "TRL recomputes activations": checkpointing,
        },
        numbers={f"{part} s": fmean(_all(seen.lines[1:], f"seconds.{part}")) for part in parts}
        | {"completions/s": completions / median(costs)},
    )


def _all(lines: list[Mapping[str, Any]], key: str) -> tuple[float, ...]:
    return tuple(float(line[key]) for line in lines)


def _lengths(lines: list[Mapping[str, Any]]) -> tuple[int, ...]:
    """Mean of each step: none is longer than asked, so the mean is that only if all are."""
    return tuple(int(line["tokens.per_completion"]) for line in lines)


def make_config(models: Path, folder: Path, tokens: int) -> Config:
    """Of one engine and one rank that take turns on all cores, as generation and training do in
    TRL's one process."""
    from medrl.data import phantoms

    data = models / f"phantoms-{SIDE}"
    if not data.exists():
        phantoms.generate(data, train=64, test=8, seed=0, size=SIDE)
    return config_of(
        {
            "run": {"name": "step", "dir": str(folder / "runs"), "steps": 1_000},
            "model": {"path": str(make_model(models))},
            "data": {"train": str(data / "train"), "test": ""},
            "reward": {"terms": [{"use": "medrl.bench.shapes:coin"}]},
            "rollout": {
                "prompts": PROMPTS,
                "completions": 8,
                "max_tokens": tokens,
                "max_model_len": 512,
            },
            "placement": {
                "engines": 1,
                "learners": 1,
                "device": "cpu",
                "cpus_per_process": 0.4,
            },
            "learner": {"zero_stage": 0},  # one rank has nobody to share with
            "eval": {"every": 0},
        }
    )


async def _same_loss(run: LiveRun, folder: Path) -> tuple[Fact, ...]:
    """Of the first step's completions, by both, from the starting model."""
    line = await run.step()
    rows = pq.read_table(run.config.run_dir / "completions" / "step_000001.parquet").to_pylist()
    rows.sort(key=lambda row: row["draw"])
    prompt_ids = [row["prompt_id"] for row in rows[:: run.config.rollout.completions]]
    token_ids, rewards = [row["token_ids"] for row in rows], [row["reward"] for row in rows]

    def ask() -> dict[str, float]:
        trl = TrlProcess(run.config, folder / "trl")
        with trl.running():
            return trl.loss(prompt_ids, token_ids, rewards)

    theirs = await asyncio.to_thread(ask)
    apart = line["gradient_norm"] / theirs["gradient_norm"]
    return (
        Equal(what="loss", ours=line["loss"], other=theirs["loss"], within=1e-4),
        Equal(what="ratio of the gradients' norms", ours=apart, other=1.0, within=1e-3),
    )


BENCHMARK = Benchmark(
    name="step",
    title="A whole step beside TRL",
    ours="medrl",
    other="TRL",
    text=(
        f"Seconds of a synchronous step of {PROMPTS} prompts: rollout, rewards, update, and on our "
        "side the push of weights to the engines. Both train the same random model on the same "
        "images and prompts in float32 on the same cores, in turns: who waits is idle. TRL is "
        "GRPOTrainer, which generates with transformers, for its vLLM mode does not run on a CPU; "
        "a microbatch is a group. It keeps activations, or recomputes them as it does unless told "
        "not to. Before anything is timed both sides' loss (1e-4) and gradient (its norm, 1e-3) of "
        "one batch of completions are compared."
    ),
    measure=measure,
    targets=(Target(case=THINK, at_least=4), Target(case=NOTHINK, at_least=5)),
    checked=False,  # its short form starts all of it: minutes, to learn what others say too
)
