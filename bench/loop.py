"""The driver's own work: groups a second where engines and learner answer at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from medrl.actors.types import Group, ScoredGroup
from medrl.bench.facts import Count, Gradients
from medrl.bench.fake_world import COMPLETIONS, MODE, FakeRun
from medrl.bench.frame import Benchmark, Case, Options, Target, paired
from medrl.reports.lines import read_lines
from medrl.rewards.compose import PlainTerm, build_rewards
from medrl.rewards.pool import RewardPool
from medrl.rewards.scorer import LocalScorer

PROMPTS = 32
PROCESSES = 2
TERMS = (PlainTerm("format"), PlainTerm("accuracy"))
GROUPS_A_SECOND, GROWTH = "groups/s", "MiB grown"
LONG, SETTLED = 100_000, 20_000
"""Groups of the run that memory is looked at in, and those before the first look: by then the
allocator holds what it needs."""


def measure(options: Options) -> list[Case]:
    steps = (1_600 if options.short else 6_400) // PROMPTS
    with RewardPool(TERMS, MODE, PROCESSES) as pool:
        scorer = _Keeping(pool)
        norms: list[float] = []
        done: list[int] = []

        def ours() -> float:
            run, seconds, lines = _whole_run(scorer, steps)
            norms.extend(run.learner.norms)
            done.append(lines)
            return seconds / (steps * PROMPTS) * 1e3

        def rewards_alone() -> float:
            return _rewards_alone(scorer.kept) * 1e3

        costs, alone = paired(ours, rewards_alone, options.pairs)
        numbers = {GROUPS_A_SECOND: 1e3 / sorted(costs)[len(costs) // 2]}
        if not options.short:
            numbers[GROWTH] = _growth(scorer)
    return [
        Case(
            name="loop",
            ours=costs,
            other=alone,
            unit="ms a group",
            facts=(
                Gradients(whose="fake learner", norms=tuple(norms)),
                Count(what="steps in metrics.jsonl", asked=steps * len(done), done=sum(done)),
            ),
            settings={
                "prompts a step": PROMPTS,
                "G": COMPLETIONS,
                "groups": steps * PROMPTS,
                "reward processes": PROCESSES,
                "rewards": "format and accuracy",
            },
            numbers=numbers,
        )
    ]


class _Keeping(LocalScorer):
    """Keeps some groups as they came, to be scored again without all the rest."""

    def __init__(self, pool: RewardPool) -> None:
        super().__init__(pool)
        self.kept: list[Group] = []

    async def score_group(self, group: Group) -> ScoredGroup:
        if len(self.kept) < 1_000:
            self.kept.append(group)
        return await super().score_group(group)


def _whole_run(scorer: LocalScorer, steps: int) -> tuple[FakeRun, float, int]:
    """The run, its seconds, and the lines that it wrote."""
    with TemporaryDirectory() as folder:
        run = FakeRun(Path(folder), scorer, prompts=PROMPTS, steps=steps)
        began = time.perf_counter()
        asyncio.run(run.run())
        seconds = time.perf_counter() - began
        return run, seconds, len(read_lines(Path(folder) / "metrics.jsonl"))


def _rewards_alone(groups: Sequence[Group]) -> float:
    """Seconds a group, of the reward functions called one after the other and nothing else."""
    rewards = build_rewards(TERMS, MODE)
    began = time.perf_counter()
    for group in groups:
        for completion in group.completions:
            rewards.score(group.request.prompt, completion.text)
    return (time.perf_counter() - began) / len(groups)


def _growth(scorer: LocalScorer) -> float:
    """MiB that this process has grown by in a long run, after its first groups."""
    sizes: list[int] = []

    class Watched(FakeRun):
        async def after_step(self, step: int) -> None:
            if step * PROMPTS >= SETTLED and step % 25 == 0:
                sizes.append(psutil.Process().memory_info().rss)

    with TemporaryDirectory() as folder:
        run = Watched(Path(folder), scorer, prompts=PROMPTS, steps=LONG // PROMPTS)
        asyncio.run(run.run())
    tenth = len(sizes) // 10
    return (max(sizes[-tenth:]) - max(sizes[:tenth])) / 2**20


BENCHMARK = Benchmark(
    name="loop",
    title="The loop itself",
    ours="loop",
    other="rewards alone",
    text=(
        "Engines and learner are fakes that answer at once; loop, sampler, buffer, sync, journal "
        "(Parquet included) and the processes of the reward pool are real. What is left is what a "
        "group costs the driver. Beside it the same completions scored by the same two reward "
        "functions in one process and nothing else: the least it could be. Memory is the driver's "
        f"growth between {SETTLED:,} and {LONG:,} groups."
    ),
    measure=measure,
    targets=(
        Target(case="loop", number=GROUPS_A_SECOND, at_least=500),
        Target(case="loop", number=GROWTH, at_most=8),
    ),
)
