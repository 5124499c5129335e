"""`medrl replay` on the real Ray, vLLM and DeepSpeed: what timing and a death decided in a run is
repeated by its journal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from real_runs import command, finish, medrl, wait_for

from medrl.reports.lines import read_lines

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

STEPS = 6
COLUMNS = ["draw", "version", "token_ids", "logprobs", "reward", "advantage"]


def test_a_run_ahead_of_its_learner_that_lost_an_engine_is_repeated(
    folder: Path, config: Path
) -> None:
    """To the last bit of what was sampled, by one engine where there were two."""
    then, now = folder / "runs" / "ahead", folder / "runs" / "ahead-replay"
    process = medrl(
        *("train", config, "run.name=ahead", "run.deterministic=true", f"run.steps={STEPS}"),
        *("rollout.staleness=1", "learner.importance_cap=2.0", "run.checkpoint_every=0"),
        *("eval.every=0", "data.test=''", "placement.learners=1"),
        cwd=folder,
    )
    wait_for(lambda: len(read_lines(then / "metrics.jsonl")) >= 2, process)
    family = psutil.Process(process.pid).children(recursive=True)
    next(one for one in family if "VLLM::EngineCore" in " ".join(command(one))).kill()
    finish(process)
    assert "left" in [line["event"] for line in read_lines(then / "faults.jsonl")]
    out = finish(medrl("replay", then, "placement.engines=1", cwd=folder))

    print(out)
    assert f"the same: {STEPS} steps" in out
    old, new = sampled(then), sampled(now)
    assert len(old) == STEPS
    assert old == new
    staleness = [
        step - 1 - row["version"] for step, rows in enumerate(old, start=1) for row in rows
    ]
    assert set(staleness) == {0, 1}
    lines = [read_lines(run / "metrics.jsonl") for run in (then, now)]
    for key in ("loss", "gradient_norm"):
        was, is_ = ([line[key] for line in of_run] for of_run in lines)
        assert is_ == pytest.approx(was, abs=1e-6, rel=0)
        assert max(map(abs, was)) > 1e-3  # else it would be of a run that learns nothing


def sampled(run: Path) -> list[list[dict[str, Any]]]:
    """By step: each completion, its log-probs to the last bit."""
    files = sorted((run / "completions").glob("*.parquet"))
    return [pq.read_table(file, columns=COLUMNS).to_pylist() for file in files]
