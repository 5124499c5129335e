"""What is done to a run: one table of faults."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Literal

from harm import (
    Harm,
    ask_to_stop,
    cut_in_half,
    damage_and_kill,
    fill_the_disk,
    flip_a_byte,
    in_a_sync,
    kill_everything,
    order,
    send,
    stop_for_good,
)

Phase = Literal["equal", "noise"]
Who = Literal["engine", "learner", "driver", "reward", "disk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A kind of fault."""

    name: str
    who: Who  # leaves, and has to come back
    what: str  # is done, for the report
    is_kill: bool  # of an engine, a rank, or the driver
    phases: tuple[Phase, ...]
    inject: Harm


BOTH: tuple[Phase, ...] = ("equal", "noise")
ACTOR, CORE, RANK = "ray::EngineActor", "VLLM::EngineCore", "ray::LearnerRankActor"


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
