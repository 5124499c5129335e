"""Rollout: a group as one request to one engine, or its completions spread over the engines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

from medrl.actors.chat import render_chat
from medrl.actors.engine import Engine
from medrl.actors.pool import EnginePool
from medrl.actors.sampler import Sampler
from medrl.actors.types import Group, RolloutRequest, Sampling
from medrl.bench.engines_at_work import CountedEngine, Counts, engines_at_work
from medrl.bench.facts import Count, Lengths, Refused
from medrl.bench.frame import Benchmark, Case, Options, Target, paired
from medrl.bench.images import make_images
from medrl.bench.shapes import NOTHINK, SHAPES, THINK, VISUAL_TOKENS, Shape, make_model, question
from medrl.cluster.engines import MAX_SEQUENCES
from medrl.configs.schema import RolloutConfig

GROUPS = 8
ENGINES = {THINK: (1, 2), NOTHINK: (1, 2, 4)}
ENCODED, HITS, SPEED = "encodings an image", "of possible hits", "completions/s"
SPREAD = "{}, spread"  # the other side's
_TIMEOUT_S = 120.0


def measure(options: Options) -> list[Case]:
    chosen = {NOTHINK: (2,)} if options.short else ENGINES
    images = options.folder / "images"
    names, model = make_images(images, GROUPS), make_model(options.folder)
    asked = {name: make_requests(model, names, SHAPES[name]) for name in chosen}
    rollout = RolloutConfig(
        prompts=GROUPS,
        completions=max(SHAPES[name].completions for name in chosen),
        max_tokens=max(SHAPES[name].tokens for name in chosen),
        max_model_len=512,
    )
    most = max(number for numbers in chosen.values() for number in numbers)
    with engines_at_work(most, model, images, rollout) as (runner, engines):
        return [
            _case(name, runner, engines[:number], asked[name], options.pairs)
            for name, numbers in chosen.items()
            for number in numbers
        ]


def case_name(shape: str, engines: int) -> str:
    return f"{shape}, {engines} engine{'s' * (engines > 1)}"


def make_requests(model: Path, images: Sequence[str], shape: Shape) -> list[RolloutRequest]:
    """A group an image, with as many words as make its prompt `shape.prompt` tokens long."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    bare = len(tokenizer(render_chat(tokenizer, "?", 1))["input_ids"]) - 1 + VISUAL_TOKENS
    text = "?" + " the" * (shape.prompt - bare)
    sampling = Sampling(num_completions=shape.completions, max_tokens=shape.tokens, temperature=1.0)
    return [
        RolloutRequest(
            draw=draw,
            prompt=question(image),
            text=text,
            sampling=sampling,
            seed=draw * shape.completions,
        )
        for draw, image in enumerate(images)
    ]


Way = Callable[[Sequence[Engine], Sequence[RolloutRequest]], Awaitable[list[Group]]]


async def as_groups(engines: Sequence[Engine], asked: Sequence[RolloutRequest]) -> list[Group]:
    """As a run does: the sampler gives each group to one engine."""
    pool = EnginePool()
    for index, engine in enumerate(engines):
        pool.add(index, engine)
    pool.serve(pool.up)
    sampler = Sampler(pool, max_sequences=MAX_SEQUENCES, timeout_s=_TIMEOUT_S)
    return await asyncio.gather(*map(sampler.sample, asked))


async def as_completions(engines: Sequence[Engine], asked: Sequence[RolloutRequest]) -> list[Group]:
    """Completion i of each group to engine i mod E, as a request of its own with its own seed."""
    return await asyncio.gather(
        *(
            engines[i % len(engines)].generate(_completion(request, i))
            for request in asked
            for i in range(request.sampling.num_completions)
        )
    )


def _completion(request: RolloutRequest, i: int) -> RolloutRequest:
    return replace(
        request, sampling=replace(request.sampling, num_completions=1), seed=request.seed + i
    )


def possible_hits(prompt: int, completions: int, block: int) -> int:
    """Tokens that a group can find in an engine's prefix cache, which was empty before.

    All completions but the first find the prompt, in whole blocks of `block` tokens. vLLM never
    takes a prompt's last token from the cache, for it needs what the model makes of it: of a prompt
    that ends with a block, that block is computed again.
    """
    return (completions - 1) * ((prompt - 1) // block * block)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A run of one side, from empty caches: a fact, and what is measured."""

    side: str
    seconds: float
    counts: Counts  # of this run, all engines
    images: int  # distinct
    completions: int  # P * G
    possible: int  # hits, in tokens, where each group is at one engine
    lengths: tuple[int, ...]  # [P * G] tokens of completions
    prompts: tuple[int, ...]  # tokens of prompts, one an answer

    def check(self) -> None:
        """Statistics that are off look like a perfect cache; caches left full, too."""
        counts = self.counts
        if counts.prompts != self.completions:
            raise Refused(
                f"{self.side}: vLLM's statistics have {counts.prompts} prompts looked up in the "
                f"prefix cache, for {self.completions} completions"
            )
        if counts.encoded < self.images:
            raise Refused(
                f"{self.side}: vLLM's statistics have {counts.encoded} images encoded, from empty "
                f"caches, of {self.images} different ones"
            )
        if counts.hits > self.possible:
            raise Refused(
                f"{self.side}: {counts.hits} tokens found in the prefix cache, more than the "
                f"{self.possible} that were put there: it was not empty before"
            )

    @property
    def encoded(self) -> float:
        """Times an image."""
        return self.counts.encoded / self.images

    @property
    def share(self) -> float:
        """Of the possible hits."""
        return self.counts.hits / self.possible


async def _run(
    side: str,
    way: Way,
    engines: Sequence[CountedEngine],
    asked: Sequence[RolloutRequest],
    shape: Shape,
) -> Sampled:
    await asyncio.gather(*(engine.forget() for engine in engines))
    before, block = await _counted(engines)
    began = time.perf_counter()
    groups = await way(engines, asked)
    seconds = time.perf_counter() - began
    after, _ = await _counted(engines)
    return Sampled(
        side=side,
        seconds=seconds,
        counts=after - before,
        images=len(asked),
        completions=len(asked) * shape.completions,
        possible=len(asked) * possible_hits(shape.prompt, shape.completions, block),
        lengths=tuple(len(one.token_ids) for group in groups for one in group.completions),
        prompts=tuple(len(group.prompt_token_ids) for group in groups),
    )


async def _counted(engines: Sequence[CountedEngine]) -> tuple[Counts, int]:
    """Of all of them, and the tokens of a block."""
    counts, blocks = zip(*[await engine.counter() for engine in engines], strict=True)
    return sum(counts, Counts()), blocks[0]


def _case(
    shape_name: str,
    runner: asyncio.Runner,
    engines: Sequence[CountedEngine],
    asked: Sequence[RolloutRequest],
    pairs: int,
) -> Case:
    name, shape = case_name(shape_name, len(engines)), SHAPES[shape_name]
    runs: dict[str, list[Sampled]] = {"groups": [], "completions": []}

    def side(which: str, way: Way) -> Callable[[], float]:
        def run() -> float:
            runs[which].append(runner.run(_run(f"{name}: {which}", way, engines, asked, shape)))
            return 1e3 * runs[which][-1].seconds / runs[which][-1].completions

        return run

    ours, other = paired(side("groups", as_groups), side("completions", as_completions), pairs)
    every = [run for which in runs.values() for run in which]
    return Case(
        name=name,
        ours=ours,
        other=other,
        unit="ms a completion",
        facts=(
            *every,
            *(Lengths(whose=run.side, asked=shape.tokens, found=run.lengths) for run in every),
            *(
                Count(
                    what=f"tokens of prompts, {run.side}",
                    asked=shape.prompt * len(run.prompts),
                    done=sum(run.prompts),
                )
                for run in every
            ),
        ),
        settings={
            "engines": len(engines),
            "threads an engine": 1,
            "prompts": len(asked),
            "T": shape.prompt,
            "G": shape.completions,
            "C": shape.tokens,
            "image": shape.side,
        },
        numbers=_numbers(runs["groups"], ours, "{}") | _numbers(runs["completions"], other, SPREAD),
    )


def _numbers(runs: Sequence[Sampled], costs: Sequence[float], name: str) -> dict[str, float]:
    return {
        name.format(ENCODED): fmean(run.encoded for run in runs),
        name.format(HITS): fmean(run.share for run in runs),
        name.format(SPEED): 1e3 / median(costs),
    }


BENCHMARK = Benchmark(
    name="rollout",
    title="Rollout: a group at one engine",
    ours="a group at one engine",
    other="spread over engines",
    text=(
        f"{GROUPS} groups, each about an image of its own, from real engines: Ray actors with vLLM "
        "on the CPU, a thread each. Ours: the sampler gives a group to one engine, as one request "
        "of G completions. Spread: completion i of each group goes to engine i mod E as a request "
        "of its own, as where the rows of a batch are dealt out. Before each run all engines are "
        "paused and resumed, which empties their prefix, image and encoder caches as a push of "
        "weights does; files are decoded before, on both sides. From vLLM's own statistics: "
        f"`{ENCODED}`, times the vision tower saw one; `{HITS}`, tokens of prompts found in "
        "the prefix cache over what its whole blocks allow where a group is at one engine, "
        "(G - 1) x floor((T - 1) / block) x block a group. Engines that are more than the cores of "
        "the machine share them: there more engines are no faster, and what is done E times over "
        "costs its full time."
    ),
    measure=measure,
    targets=tuple(
        target
        for shape, numbers in ENGINES.items()
        for number in numbers
        for target in (
            Target(case=case_name(shape, number), number=ENCODED, at_most=1),
            Target(case=case_name(shape, number), number=HITS, at_least=0.95),
        )
    ),
)
