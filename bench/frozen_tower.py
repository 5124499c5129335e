"""A vision tower that is not trained: an image's features made once a run, or in every update."""

from __future__ import annotations

from typing import Any

import torch

from medrl.bench.facts import Count, Equal, Gradients
from medrl.bench.frame import Benchmark, Case, Options, paired
from medrl.bench.learner_work import Work, make_work
from medrl.bench.shapes import NOTHINK, SHAPES, THINK, Shape

GROUPS = 2
KEPT, RUNS = "MiB kept an image", "updates"


def measure(options: Options) -> list[Case]:
    cases = [_case(options, NOTHINK, SHAPES[NOTHINK])]
    if not options.short:
        cases.append(_case(options, f"{NOTHINK}, KL", SHAPES[NOTHINK], kl_coefficient=0.04))
        cases.append(_case(options, THINK, SHAPES[THINK]))
    return cases


def _case(options: Options, name: str, shape: Shape, **learner: Any) -> Case:
    kept, without = (
        make_work(
            options.folder,
            shape,
            groups=GROUPS,
            model={"freeze_vision": True, "vision_cache_gib": gib},
            learner=learner,
        )
        for gib in (1.0, 0.0)
    )
    runs: list[int] = []
    for policy in kept.policies:
        policy.vlm.model.visual.register_forward_pre_hook(lambda *_: runs.append(1))

    def side(work: Work) -> float:
        work.forget_gradients()
        return work.seconds(Work.ours)

    ours, other = paired(lambda: side(kept), lambda: side(without), options.pairs)
    norms = tuple(_norm(work) for work in (kept, without))
    apart = max(
        float((g - without.gradients()[n]).norm()) / norms[1] for n, g in kept.gradients().items()
    )
    return Case(
        name=name,
        ours=ours,
        other=other,
        unit="s an update",
        facts=(
            Gradients(whose="kept and made anew", norms=norms),
            Equal(what="relative distance of the gradients", ours=apart, other=0, within=1e-6),
            Count(what="images encoded by towers", asked=GROUPS, done=len(runs)),
        ),
        settings={
            "groups": GROUPS,
            "T": shape.prompt,
            "G": shape.completions,
            "C": shape.tokens,
            "image": shape.side,
            "threads": torch.get_num_threads(),
        }
        | learner,
        numbers={KEPT: kept.cache.nbytes / 2**20 / GROUPS, RUNS: options.pairs + 1},
    )


def _norm(work: Work) -> float:
    return float(torch.stack([gradient.norm() for gradient in work.gradients().values()]).norm())


BENCHMARK = Benchmark(
    name="frozen_tower",
    title="Learner: a frozen vision tower",
    ours="features kept",
    other="made in every update",
    text=(
        "Updates of the same groups with model.freeze_vision, forward and backward pass, one "
        "process, float32, shared rows. Ours keeps what the tower made of an image "
        "(model.vision_cache_gib): the tower runs once an image over all updates of the run, which "
        "is counted. `KL`: with a reference model, whose tower is the same one and shares what is "
        "kept. Gradients of both are equal to 1e-6."
    ),
    measure=measure,
)
