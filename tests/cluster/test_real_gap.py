"""The gate on the log-prob gap and the reward audit, in a run on the real engines."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_runs import finish, medrl

from medrl.reports.lines import read_lines

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]


def test_a_gap_above_the_gate_stops_the_run_with_cause_and_checkpoint(
    folder: Path, config: Path
) -> None:
    """The gate is made so narrow that float32's own rounding is ten times above it."""
    overrides = ["run.name=gap", "run.steps=50", "data.test=''", "eval.every=0", "gap.mean=1e-9"]
    overrides += ["placement.engines=1", "placement.learners=1"]
    process = medrl("train", config, *overrides, cwd=folder)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1, err[-3000:]
    (said,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "gap.mean 1e-09" in said
    assert "inputs are the same (ids and image hashes of 4 prompts were compared)" in said
    assert "weights are the same (version 0 arrived with equal digests at all engines" in said
    assert "arithmetic differs, most on prompt" in said
    run = folder / "runs" / "gap"
    (metrics,) = read_lines(run / "metrics.jsonl")
    assert metrics["logprob_gap.tokens"] == metrics["tokens.completion"]
    assert 0 < metrics["logprob_gap.mean"] < metrics["logprob_gap.max"] < 1e-4
    assert "log-prob gap" in {alarm["name"] for alarm in read_lines(run / "alarms.jsonl")}
    assert (run / "checkpoints" / "step_1" / "driver.json").exists()
    told = finish(medrl("score", run, "--out", folder / "audit.jsonl", cwd=folder))
    assert "0 of 16 scores differ from those recorded" in told
