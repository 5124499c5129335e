"""What dies in a real run ends it soon, in a sentence, with a checkpoint and nothing left over."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest
from real_runs import medrl, wait_for

from medrl.cluster.journal import read_lines

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]


def test_an_engine_that_is_killed_ends_the_run_in_a_sentence_and_a_checkpoint(
    folder: Path, config: Path
) -> None:
    """Asynchronous, where its death mostly shows in a push: the update made by then is kept."""
    temporary = folder / "tmp"
    temporary.mkdir()
    overrides = [
        *("run.name=killed", "eval.max_prompts=8", "eval.every=0", "run.steps=500"),
        *("rollout.staleness=1", "learner.importance_cap=2.0"),
    ]
    process = medrl("train", config, *overrides, cwd=folder, TMPDIR=str(temporary))
    run = folder / "runs" / "killed"
    wait_for(lambda: len(read_lines(run / "metrics.jsonl")) >= 2, process)
    family = psutil.Process(process.pid).children(recursive=True)
    next(one for one in family if "EngineCore" in " ".join(one.cmdline())).kill()
    try:
        _, err = process.communicate(timeout=60)
    finally:
        for one in [*family, process]:
            if process.returncode is None:
                one.kill()
    assert process.returncode == 1, err
    assert re.search(r"^error: .*engine \d.*(EngineDead|EngineCore|process died)", err), err
    assert not [one for one in family if one.is_running() and one.status() != "zombie"]
    steps = len(read_lines(run / "metrics.jsonl"))
    assert (run / "checkpoints" / f"step_{steps}" / "driver.json").exists()
    shared = ("ray", "torchinductor_")  # Ray's logs, torch's cache: meant to stay
    assert not [path for path in temporary.iterdir() if not path.name.startswith(shared)]
