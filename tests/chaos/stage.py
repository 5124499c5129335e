"""A run on the real stack, from outside: it is started, hurt, started again, and watched."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from real_runs import ROOT, lives, medrl
from watch import Watch

from medrl.reports.lines import read_lines

PATIENCE_S = 420.0  # for anything at all; nothing takes so long, on a loaded machine either
PULSE_S = 0.1
STOPPED = 130  # exit status of a clean stop
IMPORTS = ("tests/chaos", "tests/rewards")  # where the reward that obeys orders is found


class Died(Exception):
    """The run ended though nothing of what was done to it may end it."""


@dataclass(slots=True)
class Incarnation:
    """The run from one start of its driver to its end."""

    began: float  # time.time()
    temporary: Path
    up: float | None = None
    ended: float | None = None
    how: str = ""  # it ended


@dataclass(slots=True, kw_only=True)
class Stage:
    """One run, through all its incarnations."""

    folder: Path  # of the soak; the run's own is folder/runs/NAME
    name: str
    config: Path
    overrides: tuple[str, ...]
    mark: str  # in the environment of all that it starts
    rng: random.Random
    incarnations: list[Incarnation] = field(default_factory=list)
    struck: float = 0.0  # time.time() of the last fault
    watch: Watch = field(init=False)
    _process: Any = None
    _inode: int | None = None  # of metrics.jsonl when it was started

    def __post_init__(self) -> None:
        self.watch = Watch(self.run_dir / "metrics.jsonl")

    def strike(self) -> None:
        """It is done now."""
        self.struck = time.time()

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / self.name

    @property
    def orders(self) -> Path:
        return self.folder / f"orders_{self.name}"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.{len(self.incarnations)}.log"

    @property
    def now(self) -> Incarnation:
        return self.incarnations[-1]

    def start(self) -> None:
        """Anew, or from its newest checkpoint."""
        metrics = self.run_dir / "metrics.jsonl"
        self._inode = metrics.stat().st_ino if metrics.exists() else None
        number = len(self.incarnations) + 1
        initials = "".join(word[0] for word in self.name.split("-"))
        temporary = self.folder / f"{initials}{number}"  # short: Unix sockets lie in it
        for folder in (temporary, self.orders, self.folder / "inductor"):
            folder.mkdir(exist_ok=True)
        self.incarnations.append(Incarnation(began=time.time(), temporary=temporary))
        self._process = medrl(
            *("train", self.config, f"run.name={self.name}", *self.overrides),
            *(("--resume",) if number > 1 else ()),
            cwd=self.folder,
            log=self.log,
            TMPDIR=str(temporary),
            TORCHINDUCTOR_CACHE_DIR=str(self.folder / "inductor"),
            PYTHONPATH=os.pathsep.join(
                [*(str(ROOT / path) for path in IMPORTS), os.environ.get("PYTHONPATH", "")]
            ),
            REWARD_ORDERS=str(self.orders),
            REWARD_CHAOS=self.mark,
        )
        self.watch.follow(self._process.pid)

    def lines(self, name: str) -> list[dict[str, Any]]:
        return read_lines(self.run_dir / f"{name}.jsonl")

    @property
    def step(self) -> int:
        """The last that is done; -1: this incarnation is not up."""
        metrics = self.run_dir / "metrics.jsonl"
        if self.now.up is None:
            if not metrics.exists() or metrics.stat().st_ino == self._inode:
                return -1  # not yet taken back to its checkpoint
            self.now.up = time.time()
        lines = read_lines(metrics)
        return int(lines[-1]["step"]) if lines else 0

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Raises `Died` where the run ends before, `TimeoutError` where nothing happens."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if not self.running:
                self.end("died" if self._process.returncode else "done")
                if self._process.returncode:
                    raise Died(f"exit status {self._process.returncode}: {self.tail()}")
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: waited {PATIENCE_S:g} s for {what}")
            time.sleep(PULSE_S)

    def wait_end(self, how: str = "") -> int:
        """Of the driver; its exit status. `how`: what it ended by, where that is known."""
        status = int(self._process.wait(PATIENCE_S))
        self.end(how or {0: "done", STOPPED: "stopped"}.get(status, f"status {status}"))
        return status

    def end(self, how: str) -> None:
        if self.now.ended is None:
            self.now.ended, self.now.how = time.time(), how

    def processes(self, title: str) -> list[psutil.Process]:
        """Of the run, now; the oldest first."""
        if not self.running:
            return []
        found = [one for one, name in self.watch.look() if title in name and lives(one)]
        return sorted(found, key=lambda one: one.create_time())

    def out_now(self) -> list[str]:
        """Who is out of service in this incarnation."""
        out: dict[str, None] = {}
        for line in self.lines("faults"):
            if line["time"] < self.now.began:
                continue
            if line["event"] == "left":
                out[line["who"]] = None
            else:
                out.pop(line["who"], None)
        return list(out)

    def tail(self, lines: int = 12) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def close(self) -> None:
        """Whatever happened; ends what still runs."""
        if self._process and self.running:
            for one, _ in [*self.watch.look()]:
                one.kill()
            self._process.kill()
            self._process.wait()
        self.watch.stop()
