"""An experiment on the real engines: stopped in the middle, gone on with, reported."""

import csv
import json
import signal
from pathlib import Path

import pytest
from real_runs import finish, medrl, wait_for

from medrl.reports.lines import read_lines

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

METHODS = """
[experiment]
name = "tiny"
sources = "modality"
only = ["CT"]
[[experiment.methods]]
name = "zero-shot"
train = "none"
[[experiment.methods]]
name = "SFT"
train = "sft"
[[experiment.methods]]
name = "GRPO"
train = "grpo"
"""


@pytest.fixture(scope="module")
def experiment(folder: Path, config: Path) -> Path:
    path = folder / "experiment.toml"
    text = config.read_text()
    for process in ("engines", "learners"):  # more of either would show nothing more
        text = text.replace(f"{process} = 2", f"{process} = 1")
    path.write_text(text + METHODS + "[sft]\nsteps = 3\nprompts = 4\n")
    return path


def test_a_stopped_experiment_goes_on_and_engines_serve_each_run_its_own_weights(
    folder: Path, experiment: Path
) -> None:
    """The first result is enough to stop after; the rest is done by the same command again."""
    runs = folder / "runs" / "tiny" / "runs"
    first = medrl("experiment", experiment, cwd=folder)
    wait_for(lambda: (runs / "sft-ct-s0" / "metrics.jsonl").exists(), first)
    first.send_signal(signal.SIGINT)
    finish(first, status=130)
    assert (runs / "zero_shot-s0" / "result.json").exists()

    assert "3 runs, " in finish(medrl("experiment", experiment, cwd=folder))
    results = {p.parent.name: json.loads(p.read_text()) for p in runs.glob("*/result.json")}
    assert set(results) == {"zero_shot-s0", "sft-ct-s0", "grpo-ct-s0"}
    for label in ("sft-ct-s0", "grpo-ct-s0"):
        steps = read_lines(runs / label / "metrics.jsonl")
        assert [line["step"] for line in steps] == [1, 2, 3]
        assert not (runs / label / "export").exists()
    # Each run's engines served version 0, the starting model, whatever the run before had left.
    grpo = read_lines(runs / "grpo-ct-s0" / "metrics.jsonl")
    assert max(line["logprob_gap.max"] for line in grpo) <= 1e-4
    receipts = read_lines(runs / "grpo-ct-s0" / "syncs.jsonl")
    assert [receipt["version"] for receipt in receipts] == [0, 1, 2, 3]
    assert [r["version"] for r in read_lines(runs / "sft-ct-s0" / "syncs.jsonl")][-1] == 3
    answers = [read_lines(runs / label / "evals" / "final.predictions.jsonl") for label in results]
    assert all(len(lines) == 40 for lines in answers)
    texts = [[line["completion"] for line in lines] for lines in answers]
    assert texts[0] != texts[1] != texts[2]

    table = list(csv.DictReader((folder / "runs" / "tiny" / "results.csv").open()))
    assert {row["method"] for row in table} == {"zero-shot", "SFT", "GRPO"}
    assert "<html" in (folder / "runs" / "tiny" / "report.html").read_text()
    again = finish(medrl("experiment", experiment, cwd=folder))
    assert "3 runs, 3 of them done" in again
