"""`run.deterministic` on the real Ray, vLLM and DeepSpeed: a run is what its config says, whatever
the timing, and however often it was killed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from real_runs import finish, kill_all_of, medrl, wait_for

from medrl.reports.lines import read_lines

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

OVERRIDES = (
    *("run.deterministic=true", "run.steps=4", "run.checkpoint_every=2"),
    *("eval.every=2", "eval.max_prompts=8", "placement.engines=1"),
)


def test_a_run_that_was_killed_and_resumed_is_the_run_that_never_was(
    folder: Path, config: Path
) -> None:
    """Killed as soon as the checkpoint of step 2 is there, mostly before that step's evaluation.
    One engine: that it does not matter how many there are, `test_real_replay` shows."""
    whole, killed = folder / "runs" / "whole", folder / "runs" / "killed"
    finish(medrl("train", config, *OVERRIDES, cwd=folder))
    again = ("train", config, *OVERRIDES, "run.name=killed")
    process = medrl(*again, cwd=folder)
    wait_for((killed / "checkpoints" / "step_2").exists, process)
    kill_all_of(process.pid)
    process.communicate(timeout=60)
    shutil.copytree(killed, folder / "as_killed")
    finish(medrl(*again, "--resume", cwd=folder))

    assert len(read_lines(folder / "as_killed" / "metrics.jsonl")) < 4  # it was not done yet
    assert sampled(killed) == sampled(whole)
    assert sampled(whole).keys() == {1, 2, 3, 4}
    losses = [
        [line["loss"] for line in read_lines(run / "metrics.jsonl")] for run in (whole, killed)
    ]
    norms = [
        [line["gradient_norm"] for line in read_lines(run / "metrics.jsonl")]
        for run in (whole, killed)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6, rel=0)
    assert norms[1] == pytest.approx(norms[0], abs=1e-6, rel=0)
    assert min(norms[0]) > 0  # else all of this would be of a run that learns nothing
    evaluations = [read_lines(run / "evals.jsonl") for run in (whole, killed)]
    assert evaluations[0] == evaluations[1]
    assert [line["step"] for line in evaluations[0]] == [0, 2, 4]


def sampled(run: Path) -> dict[int, list[Any]]:
    """By step: draw, tokens and log-probs of each completion, to the last bit."""
    return {
        int(file.stem.removeprefix("step_")): pq.read_table(
            file, columns=["draw", "token_ids", "logprobs", "reward", "advantage"]
        ).to_pylist()
        for file in sorted((run / "completions").glob("*.parquet"))
    }
