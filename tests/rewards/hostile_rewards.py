"""Rewards as a careless or unlucky user writes them. Each misbehaves on one completion only."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time

from medrl.actors.types import Prompt, Score

NOT_A_FUNCTION = 3


def length(completion: str, prompt: Prompt) -> float:
    return float(len(completion))


def whole_score(completion: str, prompt: Prompt) -> Score:
    return Score(components={}, total=0.25, outcome="ok", reason="a quarter")


def gives_up(completion: str, prompt: Prompt) -> Score:
    return Score(components={}, total=0.0, outcome="error", reason="no mask for this image")


def behave(completion: str, prompt: Prompt) -> float:
    """Do what the completion says."""
    action = _ACTIONS.get(completion)
    if action is not None:
        action()
    return 1.0


def _hang() -> None:
    time.sleep(1000)


def _spin() -> None:
    while True:
        pass


def _regex() -> None:
    re.match(r"(a+)+$", "a" * 40 + "b")  # holds the interpreter's lock throughout


def _exit() -> None:
    os._exit(3)


def _sys_exit() -> None:
    sys.exit("no licence")


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _hang()


def _segfault() -> None:
    ctypes.string_at(0)


def _memory() -> None:
    kept = []
    while True:
        kept.append(bytearray(64 << 20))


def _print() -> None:
    for _ in range(512):  # a gigabyte
        print("x" * (1 << 20))
        print("y" * (1 << 20), file=sys.stderr)


def _fork_and_return() -> None:
    os.fork()


def _fork_and_die() -> None:
    if os.fork() == 0:
        time.sleep(1000)  # holds the link of its dead parent
    os._exit(4)


def _fork_and_hang() -> None:
    for _ in range(20):
        if os.fork() == 0:
            break
    _hang()  # all of them, with the link of the first


def _leave_children() -> None:
    subprocess.Popen(["sleep", "987"])
    subprocess.Popen(["sleep", "987"], start_new_session=True)


def _close_all() -> None:
    os.closerange(0, 1000)


def _write_everywhere() -> None:
    for descriptor in range(3, 4096):  # a pool of a process with many files has a high one
        try:
            os.write(descriptor, b"\0\0\0\x02{}")
        except OSError:
            continue


def _recurse() -> None:
    _recurse()


def _raise() -> None:
    raise LookupError("first line\nno such lesion")


_ACTIONS = {
    name[1:]: function
    for name, function in list(globals().items())
    if name.startswith("_") and not name.startswith("__") and callable(function)
}


def tell_all(completion: str, prompt: Prompt) -> Score:
    """Its environment, and that of a program it starts, to the file that the completion names."""
    command = [sys.executable, "-c", "import os; print(dict(os.environ))"]
    started = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    with open(completion, "w") as file:
        file.write(f"{dict(os.environ)} {started}")
    return Score(components={}, total=1.0, outcome="ok", reason="told")


def spare_gold(completion: str, prompt: Prompt) -> float:
    if prompt.answer == "B":
        raise KeyError("B")
    return 1.0


def nothing(completion: str, prompt: Prompt) -> None:
    return None


def text(completion: str, prompt: Prompt) -> str:
    return "1.0"


def not_a_number(completion: str, prompt: Prompt) -> float:
    return float("nan")


def one_argument(completion: str) -> float:
    return 1.0


def swapped(prompt: Prompt, completion: str) -> float:
    return 1.0


async def later(completion: str, prompt: Prompt) -> float:
    return 1.0


def accuracy(completion: str, prompt: Prompt) -> float:
    return 1.0


def mean(completion: str, prompt: Prompt) -> float:
    return 1.0


def always_spin(completion: str, prompt: Prompt) -> float:
    _spin()
    return 1.0


def scaled(completion: str, prompt: Prompt, *, by: float) -> float:
    """A reward with an option."""
    return by * len(completion)


def slow(completion: str, prompt: Prompt) -> float:
    time.sleep(0.5)
    return 1.0


def kill_the_actor(completion: str, prompt: Prompt) -> float:
    os.kill(os.getppid(), signal.SIGKILL)
    return 1.0
