"""What a run's processes are and use, sampled by a thread while it runs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from real_runs import command, lives

from medrl.reports.lines import read_lines

EVERY_S = 0.5
SHARED = Path("/dev/shm")
KINDS = {  # a part of the command line -> what it is called in the report
    "ray::EngineActor": "engine actor",
    "VLLM::": "vLLM",
    "ray::LearnerRankActor": "learner rank",
    "ray::RewardActor": "reward actor",
    "medrl.rewards.worker": "reward process",
    "gcs_server": "Ray's head",
    "raylet": "raylet",
}


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a process at a moment."""

    time: float
    pid: int
    kind: str
    age_s: float
    bytes: int  # resident


@dataclass(frozen=True, slots=True)
class Tick:
    """The journal's last step, where it changed."""

    time: float
    step: int
    forward: bool  # a step was done; else the run went back to a checkpoint


class Watch:
    """Follows one driver of a run after another."""

    def __init__(self, metrics: Path) -> None:
        """`metrics`: the run's metrics.jsonl."""
        self._metrics = metrics
        self._inode = 0
        self._root: psutil.Process | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.seen: set[psutil.Process] = set()
        self.shared: set[str] = set()  # names in /dev/shm that any of them has mapped or open
        self.memory: list[Memory] = []
        self.ticks: list[Tick] = []

    def follow(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        if not self._thread:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()

    def look(self) -> list[tuple[psutil.Process, str]]:
        """The driver and all it started, now, each with its command line."""
        if not self._root:
            return []
        with self._lock:
            try:
                family = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return []
            self.seen.update(family)
            return [(one, " ".join(command(one))) for one in family]

    def stop(self) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join()

    def left(self) -> list[str]:
        """Those of all it ever saw that still live."""
        return [f"{one.pid} {' '.join(command(one))[:80]}" for one in self.seen if lives(one)]

    def shared_left(self) -> list[str]:
        """Shared memory that a process of the run used, and that is still there."""
        return sorted(name for name in self.shared if (SHARED / name).exists())

    def _sample(self) -> None:
        while not self._ended.wait(EVERY_S):
            now = time.time()
            self._tick(now)
            for one, title in self.look():
                with suppress(psutil.Error):
                    age_s = now - one.create_time()
                    rss = one.memory_info().rss
                    self.memory.append(Memory(now, one.pid, self._kind(one, title), age_s, rss))
                self.shared.update(shared_memory_of(one.pid))

    def _tick(self, now: float) -> None:
        if not self._metrics.exists():
            return
        inode, lines = self._metrics.stat().st_ino, read_lines(self._metrics)
        step = lines[-1]["step"] if lines else 0
        last = self.ticks[-1].step if self.ticks else 0
        if inode != self._inode or step < last:  # taken back to a checkpoint
            self.ticks.append(Tick(now, step, forward=False))
        elif step > last:
            self.ticks.append(Tick(now, step, forward=True))
        self._inode = inode

    def _kind(self, one: psutil.Process, title: str) -> str:
        if self._root and one.pid == self._root.pid:
            return "driver"
        return next((kind for part, kind in KINDS.items() if part in title), "other")


def shared_memory_of(pid: int) -> set[str]:
    """Names in /dev/shm that a process has mapped or open, those already deleted left out."""
    names: set[str] = set()
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if f" {SHARED}/" in line and not line.endswith("(deleted)"):
                names.add(line.partition(f" {SHARED}/")[2])
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                target = os.readlink(link)
                if target.startswith(f"{SHARED}/") and not target.endswith("(deleted)"):
                    names.add(target.removeprefix(f"{SHARED}/"))
    return names


def marked(mark: str) -> list[str]:
    """Living processes that carry `mark` in their environment, whoever their parent is now."""
    return [
        f"{one.pid} {' '.join(command(one))[:80]}"
        for one in psutil.process_iter()
        if one.pid != os.getpid() and mark in _environment(one) and lives(one)
    ]


def _environment(one: psutil.Process) -> Iterable[str]:
    try:
        return one.environ().values()
    except (psutil.Error, OSError):
        return ()
