"""What a run leaves on the machine is seen."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import checks
import psutil
import pytest
from watch import Watch, marked, shared_memory_of


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"], env=os.environ | {"REWARD_CHAOS": "a mark"})
    yield process
    process.kill()
    process.wait()


def test_a_process_that_is_left(sleeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """Seen by who it descends from, and, whatever became of its parents, by its mark."""
    watch = Watch(tmp_path / "metrics.jsonl")
    watch.seen.add(psutil.Process(sleeper.pid))
    deadline = time.monotonic() + 20
    while not marked("a mark") and time.monotonic() < deadline:
        time.sleep(0.01)  # it has only just started its program
    (left,), (also,) = watch.left(), marked("a mark")
    assert "sleep 60" in left
    assert "sleep 60" in also
    sleeper.kill()
    sleeper.wait()
    assert (watch.left(), marked("a mark")) == ([], [])
    assert checks.nothing_left("process", [left]) == [f"process is left: {left}"]


def test_shared_memory_that_is_left(tmp_path: Path) -> None:
    """Only what the run had mapped counts: the machine is not the run's alone."""
    watch = Watch(tmp_path / "metrics.jsonl")
    ours, others = SharedMemory(create=True, size=4096), "nobody's"
    try:
        watch.shared = shared_memory_of(os.getpid())
        assert ours.name in watch.shared_left()
        assert others not in watch.shared
    finally:
        ours.close()
        ours.unlink()
    assert ours.name not in watch.shared_left()
