"""The soak in small, on the real stack: ten faults in two runs, and every check of the long one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from plan import SHORT

LONGEST_S = 840
# Of its plan: no fault waits long while a run trains, so that all fall into few steps; the reward
# actor dies while the engine is out.
SEED = "1465"


@pytest.mark.engines
@pytest.mark.timeout(LONGEST_S + 30)
def test_a_run_that_is_hurt_is_a_run_that_is_whole(tmp_path: Path) -> None:
    """Killed engines, ranks, reward processes and drivers, a damaged checkpoint, a full disk and
    rewards that misbehave: nothing is lost, nothing trained twice, nothing left behind."""
    program, out = Path(__file__).with_name("soak.py"), tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, program, "--short", "--seed", SEED, "--out", out],
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
    )
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    report = json.loads(out.read_text())
    assert len(report["faults"]) == sum(sum(of.values()) for of in SHORT.values())
    assert all(it["hit"] or it["name"] == "disk full" for it in report["faults"])  # may not mount
    assert set(report["phases"]) == {"equal", "noise"}
