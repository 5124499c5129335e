"""Engines and learner at work at once: staleness 1 against 0, with fakes that sleep."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from medrl.actors.types import Group, ScoredGroup
from medrl.bench.facts import Count, Gradients
from medrl.bench.fake_world import MODE, FakeRun
from medrl.bench.frame import Benchmark, Case, Options, Target, paired
from medrl.reports.lines import read_lines
from medrl.rewards.compose import PlainTerm, build_rewards

PROMPTS, ENGINES, AT_ONCE = 8, 2, 2
WARM_UP = 2  # steps: until the first batch is there, the learner has nothing to do
IDLE, OVER = "slower side idle", "of the least"

SCENES = {  # seconds of a group and of an update; an engine has `AT_ONCE` groups side by side
    "learner slower": (0.10, 0.30),
    "engines slower": (0.15, 0.20),
    "alike": (0.15, 0.30),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A run's steps, less the first."""

    step_s: float
    sync_s: float
    idle_learner_s: float
    idle_rollout_s: float
    steps: int
    norms: tuple[float, ...]


def measure(options: Options) -> list[Case]:
    steps = 8 if options.short else 30
    return [_case(name, steps, options.pairs) for name in SCENES]


def _case(name: str, steps: int, pairs: int) -> Case:
    group_s, learn_s = SCENES[name]
    rollout_s = group_s * PROMPTS / (ENGINES * AT_ONCE)
    at_once: list[Timed] = []
    in_turns: list[Timed] = []

    def run(runs: list[Timed], staleness: int) -> float:
        runs.append(_run(group_s, learn_s, steps, staleness=staleness))
        return runs[-1].step_s

    ours, other = paired(lambda: run(at_once, 1), lambda: run(in_turns, 0), pairs, warm_up=False)
    # In turns nothing runs when a push begins: all of it is the push's own, and no waiting.
    sync_s = fmean(one.sync_s for one in in_turns)
    least_s = max(rollout_s, learn_s) + sync_s
    runs = (*at_once, *in_turns)
    return Case(
        name=name,
        ours=ours,
        other=other,
        unit="s a step",
        facts=(
            Gradients(whose="fake learner", norms=tuple(n for run in runs for n in run.norms)),
            Count(
                what="steps", asked=steps * len(runs), done=sum(run.steps + WARM_UP for run in runs)
            ),
        ),
        settings={
            "prompts a step": PROMPTS,
            "engines": ENGINES,
            "rollout s": round(rollout_s, 3),
            "learn s": learn_s,
            "sync s": round(sync_s, 4),
            "steps": steps,
        },
        numbers={
            IDLE: fmean(_idle_share(one, learn_s >= rollout_s) for one in at_once),
            OVER: fmean(one.step_s / least_s for one in at_once),
        },
    )


def _idle_share(run: Timed, learner: bool) -> float:
    """Of the learner's time or the engines', from step to step."""
    return (run.idle_learner_s if learner else run.idle_rollout_s) / run.step_s


class _Rewards:
    """The reward functions, in this process: not what is measured here."""

    def __init__(self) -> None:
        self._rewards = build_rewards((PlainTerm("format"), PlainTerm("accuracy")), MODE)

    async def score_group(self, group: Group) -> ScoredGroup:
        prompt = group.request.prompt
        scores = tuple(self._rewards.score(prompt, one.text) for one in group.completions)
        return ScoredGroup(group=group, scores=scores, seconds=0.0)


def _run(group_s: float, learn_s: float, steps: int, *, staleness: int) -> Timed:
    with TemporaryDirectory() as folder:
        run = FakeRun(
            Path(folder),
            _Rewards(),
            prompts=PROMPTS,
            steps=steps,
            staleness=staleness,
            engines=ENGINES,
            group_seconds=group_s,
            at_once=AT_ONCE,
            learn_seconds=learn_s,
        )
        asyncio.run(run.run())
        lines = read_lines(Path(folder) / "metrics.jsonl")[WARM_UP:]

    def mean(key: str) -> float:
        return fmean(line[f"seconds.{key}"] for line in lines)

    return Timed(
        step_s=mean("step"),
        sync_s=mean("sync"),
        idle_learner_s=mean("idle_learner"),
        idle_rollout_s=mean("idle_rollout"),
        steps=len(lines),
        norms=tuple(run.learner.norms),
    )


BENCHMARK = Benchmark(
    name="overlap",
    title="Engines and learner at once",
    ours="staleness 1",
    other="staleness 0",
    text=(
        "Fakes that sleep in place of engines and learner, as if each had machines of its own; the "
        f"loop is real. {ENGINES} engines work on {AT_ONCE} groups each. With staleness 1 a step "
        "should take what the slower side takes, and the sync; with 0 it takes both sides' time. "
        f"{IDLE}: share of its time (where both are alike, the learner's). {OVER}: a step over "
        "max(rollout, learn) + sync."
    ),
    measure=measure,
    targets=tuple(
        target
        for name in SCENES
        for target in (
            Target(case=name, number=IDLE, at_most=0.05),
            Target(case=name, number=OVER, at_most=1.1),
        )
    ),
)
