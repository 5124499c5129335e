"""The learner's forward and backward pass: a shared row against padded rows, and against FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor

from medrl.bench import flops
from medrl.bench.facts import Equal, Fact, Gradients
from medrl.bench.frame import Benchmark, Case, Options, Target, paired
from medrl.bench.learner_work import Work, make_work
from medrl.bench.memory import PeakMemory
from medrl.bench.shapes import NOTHINK, SHAPES, THINK, Shape
from medrl.learner import rows

OF_FLOPS, MEMORY, OTHER_MEMORY = "of FLOPs", "MiB, shared", "MiB, padded"
LONG, LONGER, SMALL = "C=256", "C=1024", "small image"
OWN_SHAPES = SHAPES | {
    LONG: Shape(prompt=256, tokens=256),
    LONGER: Shape(prompt=256, tokens=1024),
    SMALL: Shape(prompt=100, completions=4, tokens=48, side=112),
}
USUAL, IMAGE_ONCE = "{}", "{}, image once"
"""Names of a shape's cases: the image with every padded row, or once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """A way to run the work, and what `flops.of_pass` calls it."""

    name: flops.Way
    run: Callable[[Work], None]


def _shared(work: Work) -> None:
    with patch.object(rows, "WORTH_SHARING", 0.0):
        work.ours()


def _padded(work: Work) -> None:
    with patch.object(rows, "WORTH_SHARING", float("inf")):
        work.ours()


SHARED = _Way(name="shared", run=_shared)
PADDED = _Way(name="padded", run=_padded)
BY_TRANSFORMERS = _Way(name="usual", run=Work.usual)


def measure(options: Options) -> list[Case]:
    chosen = [(SMALL, USUAL, BY_TRANSFORMERS), (SMALL, IMAGE_ONCE, PADDED)]
    if not options.short:
        chosen += [(shape, USUAL, BY_TRANSFORMERS) for shape in (THINK, NOTHINK)]
        chosen += [(shape, IMAGE_ONCE, PADDED) for shape in (THINK, NOTHINK, LONG, LONGER)]
    return [_case(options, shape, name.format(shape), other) for shape, name, other in chosen]


def _case(options: Options, shape_name: str, name: str, other: _Way) -> Case:
    shape = OWN_SHAPES[shape_name]
    work = make_work(options.folder, shape, groups=1)
    facts = _same_gradients(work, other)  # the warm-up, too
    peaks: dict[str, list[int]] = {SHARED.name: [], other.name: []}

    def side(way: _Way) -> Callable[[], float]:
        def run() -> float:
            work.forget_gradients()
            memory = PeakMemory()
            seconds = work.seconds(way.run)
            peaks[way.name].append(memory.bytes)
            return seconds

        return run

    ours, theirs = paired(side(SHARED), side(other), options.pairs, warm_up=False)
    cost = {way.name: _operations(work, shape, way) for way in (SHARED, other)}
    predicted = cost[other.name] / cost[SHARED.name]
    measured = median(b / a for a, b in zip(ours, theirs, strict=True))
    return Case(
        name=name,
        ours=ours,
        other=theirs,
        unit="s a group",
        facts=facts,
        settings=_settings(shape) | {"ratio by FLOPs": round(predicted, 2)},
        numbers={
            OF_FLOPS: measured / predicted,
            "GFLOP/s, shared": cost[SHARED.name] / median(ours) / 1e9,
            MEMORY: median(peaks[SHARED.name]) / 2**20,
            OTHER_MEMORY: median(peaks[other.name]) / 2**20,
        },
    )


def _operations(work: Work, shape: Shape, way: _Way) -> int:
    return flops.of_pass(
        work.reader.config,
        way.name,
        prompt=shape.prompt,
        completions=shape.completions,
        tokens=shape.tokens,
        patches=work.patches,
    )


def _settings(shape: Shape) -> dict[str, object]:
    return {
        "T": shape.prompt,
        "G": shape.completions,
        "C": shape.tokens,
        "image": shape.side,
        "threads": torch.get_num_threads(),
    }


def _same_gradients(work: Work, other: _Way) -> tuple[Fact, ...]:
    """That both are of the same loss, and are there."""
    found: list[dict[str, Tensor]] = []
    for way in (SHARED, other):
        work.forget_gradients()
        way.run(work)
        found.append(work.gradients())
    ours, theirs = found
    if ours.keys() != theirs.keys():
        raise ValueError(f"gradients of {len(ours)} tensors here and {len(theirs)} there")
    norms = tuple(_norm(one.values()) for one in found)
    apart = _norm(ours[name] - theirs[name] for name in ours) / norms[1]
    return (
        Gradients(whose="shared and padded rows", norms=norms),
        Equal(what="relative distance of the gradients", ours=apart, other=0.0, within=1e-5),
    )


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())


BENCHMARK = Benchmark(
    name="learner_rows",
    title="Learner: one shared row a group",
    ours="shared row",
    other="padded rows",
    text=(
        "Forward and backward pass of one group, one process, float32, the whole model trained. "
        "Ours: the learner's one row, prompt and image once. Padded rows as trainers have them: "
        "transformers' own model and attention on a row a completion, the image encoded with each "
        "(the head reads completion positions only, on both sides). Lines named `image once`: the "
        "learner's own padded rows, which encode the image once. Both sides have the same loss, "
        "and gradients that are compared before anything is timed. `of FLOPs`: the ratio over the "
        "one that counting operations predicts (bench/flops.py). Memory: the peak above what was "
        "resident before the pass."
    ),
    measure=measure,
    targets=(
        Target(case=THINK, at_least=3.5),
        Target(case=NOTHINK, at_least=6),
        Target(case=THINK, number=OF_FLOPS, at_least=0.85),
        Target(case=NOTHINK, number=OF_FLOPS, at_least=0.85),
        Target(case=IMAGE_ONCE.format(LONG), at_least=1),
        Target(case=IMAGE_ONCE.format(LONGER), at_least=1),
    ),
)
