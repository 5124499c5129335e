"""How a run is hurt: each function does it, and says what it hit, "" where there was nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from real_runs import kill_all_of
from stage import STOPPED, Died, Stage

Harm = Callable[[Stage], str]

SETTLED_S = 60.0  # longest wait for nobody to be out of service
_LEFT_BYTES = 1 << 20  # of a disk that is full


def send(number: int, title: str) -> Harm:
    """A signal to any process of that title."""

    def inject(stage: Stage) -> str:
        there = stage.processes(title)
        return _send(stage, stage.rng.choice(there), number) if there else ""

    return inject


def stop_for_good(title: str) -> Harm:
    """SIGSTOP while nobody is out of service: one that hangs while it starts has another, longer
    deadline."""

    def inject(stage: Stage) -> str:
        deadline = time.monotonic() + SETTLED_S
        while stage.out_now() and time.monotonic() < deadline:
            time.sleep(0.2)
        there = stage.processes(title)
        return _send(stage, stage.rng.choice(there), signal.SIGSTOP) if there else ""

    return inject


def in_a_sync(title: str) -> Harm:
    """SIGKILL when, to judge by the step before, weights are on their way."""

    def inject(stage: Stage) -> str:
        last = len(stage.lines("metrics"))
        stage.wait(lambda: len(stage.lines("metrics")) != last, "a step")
        line = (stage.lines("metrics") or [{}])[-1]
        step_s, sync_s = line.get("seconds.step", 1.0), line.get("seconds.sync", 0.2)
        time.sleep(max(0.0, step_s - stage.rng.random() * sync_s - 0.05))
        there = stage.processes(title)
        return _send(stage, stage.rng.choice(there), signal.SIGKILL) if there else ""

    return inject


def _send(stage: Stage, one: psutil.Process, number: int) -> str:
    stage.strike()
    try:
        one.send_signal(number)
    except psutil.NoSuchProcess:
        return ""
    return f"process {one.pid}"


def kill_everything(stage: Stage) -> str:
    """The driver and all its descendants; then the user resumes the run."""
    _kill_all(stage)
    stage.start()
    return "all processes"


def _kill_all(stage: Stage) -> None:
    _withdraw_orders(stage)
    stage.strike()
    kill_all_of(stage.pid)
    stage.wait_end("killed")


def damage_and_kill(harm: Callable[[Path], None], said: str) -> Harm:
    def inject(stage: Stage) -> str:
        _kill_all(stage)
        folder = stage.run_dir / "checkpoints"
        steps = sorted(int(it.name[5:]) for it in folder.glob("step_*") if it.name[5:].isdigit())
        if len(steps) < 2:
            stage.start()
            return ""
        files = sorted(it for it in (folder / f"step_{steps[-1]}").rglob("*") if it.is_file())
        file = stage.rng.choice([it for it in files if it.stat().st_size])
        harm(file)
        name = file.relative_to(folder).as_posix()
        stage.start()
        stage.wait(lambda: "is damaged" in stage.log.read_text(), f"word of {name}'s damage")
        return f"{name} {said}"

    return inject


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 0x10
    file.write_bytes(data)


def cut_in_half(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def ask_to_stop(number: signal.Signals, *, all_of_them: bool) -> Harm:
    """As a terminal does (`all_of_them`), or as whoever wants the machine back. Then resume."""

    def inject(stage: Stage) -> str:
        _withdraw_orders(stage)
        stage.strike()
        os.killpg(stage.pid, number) if all_of_them else os.kill(stage.pid, number)
        status = stage.wait_end()
        if status not in (STOPPED, 0):
            raise Died(f"{number.name}: exit status {status}, not {STOPPED}: {stage.tail()}")
        if status == 0:
            return ""  # it was done
        stage.start()
        return "the driver's process group" if all_of_them else "the driver"

    return inject


def fill_the_disk(stage: Stage) -> str:
    """Until a checkpoint could not be written; then there is room again."""
    folder = stage.run_dir / "checkpoints"
    if not os.path.ismount(folder):
        return ""
    filler = folder / "filler"

    def failed() -> int:
        return stage.log.read_text().count("could not be written")

    def full_and_failed() -> bool:
        _fill(filler)  # again and again: checkpoints are written, and deleted, meanwhile
        return failed() > before

    before = failed()
    try:
        _fill(filler)
        stage.strike()
        stage.wait(full_and_failed, "a checkpoint that fails")
    finally:
        filler.unlink(missing_ok=True)
    return "the checkpoints' file system, 1 MiB left"


def _fill(filler: Path) -> None:
    """Make it larger by all that is free, but for `_LEFT_BYTES`."""
    with filler.open("ab") as file, contextlib.suppress(OSError):  # another was there first
        room = os.fstatvfs(file.fileno())
        free = room.f_bavail * room.f_frsize - _LEFT_BYTES
        if free > 0:
            os.posix_fallocate(file.fileno(), file.tell(), free)


def order(action: str) -> Harm:
    """To the reward; what is known as `action` in tests/rewards/hostile_rewards.py."""

    def inject(stage: Stage) -> str:
        number = len(list(stage.orders.iterdir()))
        path = stage.orders / f"{number:03d}-{action}.order"
        path.touch()
        try:
            stage.wait(lambda: not path.exists(), f"the reward to be asked to {action}")
        except Died:
            path.unlink(missing_ok=True)
            raise
        stage.strike()
        return "one completion" if path.with_suffix(".claimed").exists() else ""

    return inject


def _withdraw_orders(stage: Stage) -> None:
    """Else the check of the rewards, before a run starts, would meet them."""
    for path in stage.orders.glob("*.order"):
        path.unlink()
