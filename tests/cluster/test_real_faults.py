"""What hangs in a real run comes back in the same run, which then does all it was to do. What is
killed: `tests/chaos`."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from real_runs import finish, medrl, wait_for

from medrl.reports.lines import read_lines

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

ALLOWANCE_S = 10.0  # to notice a death, and to bring the version
STARTS = 3  # of this length: what is started again shares the machine with the rest, and others


class RealRun:
    """A run on the real engines, seen from outside."""

    def __init__(self, name: str, config: Path, folder: Path, *overrides: str) -> None:
        self.temporary = folder / name[0]  # short: Unix sockets lie in it
        self.temporary.mkdir()
        self.folder = folder / "runs" / name
        self._began = time.monotonic()
        self.process: subprocess.Popen[str] = medrl(
            *("train", config, f"run.name={name}", "eval.every=0", "eval.max_prompts=8"),
            *("placement.sync_timeout_s=60", *overrides),
            cwd=folder,
            TMPDIR=str(self.temporary),
        )
        self._seen: set[psutil.Process] = set()
        self.start_s = 0.0

    def lines(self, name: str) -> list[dict[str, Any]]:
        return read_lines(self.folder / f"{name}.jsonl")

    def wait_for_steps(self, count: int) -> None:
        """Counted from the process's start: `start_s` is how long the first took."""
        wait_for(lambda: len(self.lines("metrics")) >= count, self.process)
        self.start_s = self.start_s or time.monotonic() - self._began

    def wait_for_event(self, who: str, event: str) -> None:
        wait_for(
            lambda: (who, event) in [(it["who"], it["event"]) for it in self.lines("faults")],
            self.process,
        )

    def processes(self, title: str) -> list[psutil.Process]:
        """Of the run, now, by what stands in their command line; the oldest first."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self._seen.update(family)
        return sorted(
            (one for one in family if title in " ".join(_command(one))),
            key=lambda one: one.create_time(),
        )

    def seconds_out(self) -> dict[str, float]:
        """Of all that left and came back."""
        return {it["who"]: it["seconds"] for it in self.lines("faults") if it["event"] != "left"}

    def is_whole(self, steps: int) -> bool:
        """All steps, versions that only grow, and nothing of the run left on the machine."""
        metrics, syncs = self.lines("metrics"), self.lines("syncs")
        versions = [receipt["version"] for receipt in syncs]
        shared = ("ray", "torchinductor_")  # Ray's logs, torch's cache: meant to stay
        return (
            [line["step"] for line in metrics] == list(range(1, steps + 1))
            and versions == sorted(versions)
            and set(versions) == set(range(steps + 1))
            and not [one for one in self._seen if _lives(one)]
            and not [it for it in self.temporary.iterdir() if not it.name.startswith(shared)]
        )

    def end(self) -> None:
        """Whatever the test found."""
        if self.process.poll() is None:
            for one in [*self.processes(""), self.process]:
                one.kill()


def _command(one: psutil.Process) -> list[str]:
    try:
        return one.cmdline()
    except psutil.Error:
        return []


def _lives(one: psutil.Process) -> bool:
    try:
        return one.is_running() and one.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def runs() -> Iterator[list[RealRun]]:
    started: list[RealRun] = []
    yield started
    for run in started:
        run.end()


def test_the_only_engine_hangs_and_the_run_goes_on(
    folder: Path, config: Path, runs: list[RealRun]
) -> None:
    """vLLM's process is stopped, not ended: only an answer that does not come shows it. And the
    only learner rank is killed meanwhile."""
    steps, heartbeat_s = 8, 5.0
    sizes = ["placement.engines=1", "placement.learners=1", "run.checkpoint_every=0"]
    heartbeat = f"placement.heartbeat_s={heartbeat_s}"
    run = RealRun("hung", config, folder, f"run.steps={steps}", *sizes, heartbeat)
    runs.append(run)
    run.wait_for_steps(2)
    stopped = time.time()
    run.processes("VLLM::EngineCore")[0].send_signal(signal.SIGSTOP)
    run.wait_for_event("engine 0", "left")
    (left,) = run.lines("faults")
    assert left["time"] - stopped < heartbeat_s + ALLOWANCE_S
    run.processes("ray::LearnerRankActor")[0].kill()
    out = finish(run.process)
    print(f"start-up {run.start_s:.1f} s, out of service: {run.seconds_out()}")
    assert run.is_whole(steps)
    assert run.seconds_out()["engine 0"] < STARTS * run.start_s + ALLOWANCE_S
    assert "engine 0 is started again: engine 0 hangs: no answer to a ping within 5 s" in out
    assert "going on from step 0" in out  # no checkpoint was made: from the starting model
