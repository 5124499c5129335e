"""What is done to a run: one table of faults."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from real_runs import kill_all_of
from stage import STOPPED, Died, Stage

Phase = Literal["equal", "noise"]
Who = Literal["engine", "learner", "driver", "reward", "disk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A kind of fault. `inject` does it and says what it hit, "" where there was nothing to hit."""

    name: str
    who: Who  # leaves, and has to come back
    what: str  # is done, for the report
    is_kill: bool  # of an engine, a rank, or the driver
    phases: tuple[Phase, ...]
    inject: Callable[[Stage], str]


BOTH: tuple[Phase, ...] = ("equal", "noise")
ACTOR, CORE, RANK = "ray::EngineActor", "VLLM::EngineCore", "ray::LearnerRankActor"
SETTLED_S = 60.0  # longest wait for nobody to be out of service


def send(number: int, title: str) -> Callable[[Stage], str]:
    """A signal to any process of that title."""

    def inject(stage: Stage) -> str:
        there = stage.processes(title)
        return _send(stage, stage.rng.choice(there), number) if there else ""

    return inject


def stop_for_good(title: str) -> Callable[[Stage], str]:
    """SIGSTOP while nobody is out of service: one that hangs while it starts has another, longer
    deadline."""

    def inject(stage: Stage) -> str:
        deadline = time.monotonic() + SETTLED_S
        while stage.out_now() and time.monotonic() < deadline:
            time.sleep(0.2)
        there = stage.processes(title)
        return _send(stage, stage.rng.choice(there), signal.SIGSTOP) if there else ""

    return inject


def in_a_sync(title: str) -> Callable[[Stage], str]:
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


def damage_and_kill(harm: Callable[[Path], None], said: str) -> Callable[[Stage], str]:
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


def ask_to_stop(number: signal.Signals, *, all_of_them: bool) -> Callable[[Stage], str]:
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

    before = failed()
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    try:
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(0, free - (1 << 20)))
        stage.strike()
        stage.wait(lambda: failed() > before, "a checkpoint that fails")
    finally:
        filler.unlink(missing_ok=True)
    return "the checkpoints' file system, 1 MiB left"


def order(action: str) -> Callable[[Stage], str]:
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


def _reward_fault(action: str, what: str) -> Fault:
    return Fault(
        name=f"reward: {action.replace('_', ' ')}",
        who="reward",
        what=what,
        is_kill=False,
        phases=("noise",),
        inject=order(action),
    )


KILL, HANG = signal.SIGKILL, "SIGSTOP to"

FAULTS: tuple[Fault, ...] = (
    Fault(
        name="engine actor killed",
        who="engine",
        what="SIGKILL to an engine's Ray actor",
        is_kill=True,
        phases=BOTH,
        inject=send(KILL, ACTOR),
    ),
    Fault(
        name="vLLM process killed",
        who="engine",
        what="SIGKILL to an engine's vLLM process",
        is_kill=True,
        phases=BOTH,
        inject=send(KILL, CORE),
    ),
    Fault(
        name="engine killed in a sync",
        who="engine",
        what="SIGKILL to a vLLM process when a push is due",
        is_kill=True,
        phases=BOTH,
        inject=in_a_sync(CORE),
    ),
    Fault(
        name="learner rank killed",
        who="learner",
        what="SIGKILL to any learner rank",
        is_kill=True,
        phases=BOTH,
        inject=send(KILL, RANK),
    ),
    Fault(
        name="rank killed in a sync",
        who="learner",
        what="SIGKILL to any learner rank when a push is due",
        is_kill=True,
        phases=BOTH,
        inject=in_a_sync(RANK),
    ),
    Fault(
        name="everything killed",
        who="driver",
        what="SIGKILL to the driver and all its descendants, then `medrl train --resume`",
        is_kill=True,
        phases=BOTH,
        inject=kill_everything,
    ),
    Fault(
        name="everything killed, a byte flipped",
        who="driver",
        what="the same, and a bit of a random file of the newest checkpoint is changed",
        is_kill=True,
        phases=("equal",),
        inject=damage_and_kill(flip_a_byte, "changed"),
    ),
    Fault(
        name="everything killed, a file cut",
        who="driver",
        what="the same, and a random file of the newest checkpoint is cut in half",
        is_kill=True,
        phases=("equal",),
        inject=damage_and_kill(cut_in_half, "cut in half"),
    ),
    Fault(
        name="vLLM process hangs",
        who="engine",
        what=f"{HANG} an engine's vLLM process",
        is_kill=False,
        phases=BOTH,
        inject=stop_for_good(CORE),
    ),
    Fault(
        name="learner rank hangs",
        who="learner",
        what=f"{HANG} any learner rank",
        is_kill=False,
        phases=("equal",),
        inject=stop_for_good(RANK),
    ),
    Fault(
        name="Ctrl-C",
        who="driver",
        what="SIGINT to the driver's process group, then `medrl train --resume`",
        is_kill=False,
        phases=("equal",),
        inject=ask_to_stop(signal.SIGINT, all_of_them=True),
    ),
    Fault(
        name="SIGTERM",
        who="driver",
        what="SIGTERM to the driver, then `medrl train --resume`",
        is_kill=False,
        phases=("equal",),
        inject=ask_to_stop(signal.SIGTERM, all_of_them=False),
    ),
    Fault(
        name="disk full",
        who="disk",
        what="the checkpoints' file system is filled until a checkpoint fails",
        is_kill=False,
        phases=("equal",),
        inject=fill_the_disk,
    ),
    Fault(
        name="reward actor killed",
        who="reward",
        what="SIGKILL to the reward actor",
        is_kill=False,
        phases=BOTH,
        inject=send(KILL, "ray::RewardActor"),
    ),
    Fault(
        name="reward process killed",
        who="reward",
        what="SIGKILL to a process of the reward pool",
        is_kill=False,
        phases=("noise",),
        inject=send(KILL, "medrl.rewards.worker"),
    ),
    _reward_fault("spin", "an endless loop"),
    _reward_fault("regex", "a catastrophic regular expression, which holds the interpreter"),
    _reward_fault("memory", "takes memory until there is none"),
    _reward_fault("exit", "os._exit"),
    _reward_fault("print", "prints a gigabyte"),
    _reward_fault("fork_and_die", "forks a child that holds the pipe, and exits"),
    _reward_fault("leave_children", "starts programs that outlive it"),
    _reward_fault("raise", "raises"),
    _reward_fault("segfault", "SIGSEGV"),
)
