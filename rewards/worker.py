"""What runs in a reward process: `python -m medrl.rewards.worker LINK NOTE PARENT MEMORY`.

It reads the set-up, says that it is ready (or what is wrong), and then answers each message of
completions with a message a completion, in order. Which reward it is in, it notes in memory shared
with the pool: one that hangs or takes the process with it can no longer be asked. It imports
rewards, types and the user's modules only, so that a replacement is there in a moment.

LINK, NOTE: descriptors. PARENT: a process id. MEMORY: bytes of address space.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import signal
import socket
import sys
from dataclasses import asdict
from pathlib import Path

from medrl.actors.types import Prompt
from medrl.configs.errors import UserError
from medrl.rewards.compose import PlainTerm, Rewards, build_rewards
from medrl.rewards.wire import pack, unpack

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Serve until the other side closes or dies."""
    descriptor, note, parent, memory_bytes = map(int, sys.argv[1:5])
    _confine(parent, memory_bytes)
    os.set_inheritable(descriptor, False)  # not for the programs that a reward starts
    running = mmap.mmap(note, 1)
    os.close(note)
    with socket.socket(fileno=descriptor) as link:
        try:
            setup = unpack(link.recv)
            terms = [PlainTerm(*term) for term in setup["terms"]]
            try:
                rewards = build_rewards(terms, setup["mode"], policy=setup["policy"])
            except UserError as error:
                link.sendall(pack({"problems": error.problems}))
                return
            link.sendall(pack({"problems": []}))
            while True:
                _serve(link, rewards, running)
        except (EOFError, ConnectionError):
            return


def _serve(link: socket.socket, rewards: Rewards, running: mmap.mmap) -> None:
    def begin(number: int) -> None:
        running[0] = min(number + 1, 255)

    message = unpack(link.recv)
    prompts = [
        Prompt(**{**row, "options": tuple(row["options"]), "images": tuple(row["images"])})
        for row in message["prompts"]
    ]
    process = os.getpid()
    for number, completion in message["items"]:
        score = rewards.score(prompts[number], completion, begin)
        if os.getpid() != process:  # a reward forked and returned, and this is the child
            os._exit(0)
        link.sendall(pack(asdict(score)))


def _confine(parent: int, memory_bytes: int) -> None:
    """Die with the parent, whatever happens; hold at most `memory_bytes`; leave no core file. Where
    the machine's memory ends before that, be what the kernel ends first."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):  # a container may forbid it
            Path("/proc/self/oom_score_adj").write_text("1000")
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    _, most = resource.getrlimit(resource.RLIMIT_AS)  # RLIM_INFINITY is -1
    limit = memory_bytes if most == resource.RLIM_INFINITY else min(memory_bytes, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
