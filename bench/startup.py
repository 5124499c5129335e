"""From `medrl train` to the first completion, part by part, on the real Ray, vLLM and DeepSpeed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from medrl.bench.facts import Count, Gradients, Refused
from medrl.bench.frame import Benchmark, Case, Options
from medrl.bench.records import ROOT
from medrl.data import phantoms
from medrl.reports.lines import read_lines

_LIMIT_S = 500
_LAST_LINES = 2_000  # characters of what a run that failed said


def measure(options: Options) -> list[Case]:
    data = options.folder.absolute() / "phantoms-84"
    if not data.exists():
        phantoms.generate(data, train=64, test=32, seed=0)
    starts, norms = zip(*(_start(data) for _ in range(options.pairs)), strict=True)
    parts = list(starts[0]["parts"])
    beside = list(starts[0]["side_by_side"])
    numbers = {f"{part} s": median(one["parts"][part] for one in starts) for part in parts}
    numbers |= {f"{name} s": median(one["side_by_side"][name] for one in starts) for name in beside}
    return [
        Case(
            name="demo",
            ours=tuple(one["seconds"] for one in starts),
            other=tuple(_one_after_the_other(one) for one in starts),
            unit="s",
            facts=(
                Gradients(whose="learner", norms=tuple(norms)),
                Count(what="starts", asked=options.pairs, done=len(starts)),
            ),
            settings={"config": "configs/demo.toml", "engines": 2, "learner ranks": 2},
            numbers=numbers,
        )
    ]


def _one_after_the_other(start: Mapping[str, Any]) -> float:
    """What the same start takes where engines load first and then the ranks, as measured."""
    beside = start["side_by_side"]
    return float(start["seconds"] + sum(beside.values()) - max(beside.values()))


def _start(data: Path) -> tuple[dict[str, Any], float]:
    """A run of one step: its line of startup.jsonl, and the norm of its gradient."""
    with TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "medrl.cluster", "train", "configs/demo.toml"),
            *(f"run.dir={folder}", "run.name=start", "run.steps=1", "run.checkpoint_every=0"),
            *(f"data.train={data / 'train'}", 'data.test=""', "eval.every=0"),
        ]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
        if done.returncode:
            told = f"{done.stdout[-_LAST_LINES:]}{done.stderr[-_LAST_LINES:]}"
            raise Refused(f"medrl train ended with status {done.returncode}: {told}")
        run = Path(folder) / "start"
        (line,) = read_lines(run / "startup.jsonl")
        (step,) = read_lines(run / "metrics.jsonl")
        return line, float(step["gradient_norm"])


BENCHMARK = Benchmark(
    name="startup",
    title="From the command to the first completion",
    ours="as it is",
    other="engines, then ranks",
    text=(
        "Seconds from `medrl train` on the demo to the first completion of a real run, as its "
        "startup.jsonl has them. Engines and learner ranks load side by side; the other column "
        "adds the shorter of the two, measured beside the longer: where they share cores it is too "
        "long. The parts follow one another and add up; engines and learner "
        "are beside each other in one of them. What was done about it: they start side by side; on "
        "CPUs an engine is one process of vLLM's, not two (5 s), and compiles nothing (8 s)."
    ),
    measure=measure,
    checked=False,
)
