"""Runs of the command line as a user starts them, seen from outside, on the real engines."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]


def medrl(
    *arguments: object, cwd: Path, log: Path | None = None, **variables: str
) -> subprocess.Popen[str]:
    """The command line in a process group of its own, as a terminal would have it. `log`: a file
    that takes what it says; None: pipes."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    with log.open("a") if log else nullcontext(subprocess.PIPE) as out:
        return subprocess.Popen(
            [sys.executable, "-m", "medrl.cluster", *map(str, arguments)],
            cwd=cwd,
            env=environment | variables,  # no key for W&B, whoever runs the tests
            stdout=out,
            stderr=out,
            text=True,
            start_new_session=True,
        )


def listening(processes: Iterable[psutil.Process]) -> set[str]:
    """The addresses at which they listen."""
    return {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


def files_with(folder: Path, text: str) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if text.encode() in path.read_bytes()]


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    out, err = process.communicate(timeout=500)
    assert process.returncode == status, f"{out[-3000:]}\n{err[-3000:]}"
    return out


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 240
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.2)


def command(one: psutil.Process) -> list[str]:
    """Empty where it is gone."""
    try:
        return one.cmdline()
    except psutil.Error:
        return []


def lives(one: psutil.Process) -> bool:
    """By its id and the time it began: another process may have been given the id."""
    try:
        return one.is_running() and one.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_all_of(pid: int) -> None:
    """SIGKILL to a process and all it started, as a machine that loses its power does."""
    parent = psutil.Process(pid)
    family = [parent, *parent.children(recursive=True)]
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.suspend()  # so that nobody starts anything, or ends by itself, meanwhile
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(family[1:], timeout=15)
