"""One reward process, seen from outside: started, asked, and killed when it does not answer."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from medrl.actors.types import Outcome, Prompt, Score
from medrl.configs.errors import RewardError, UserError
from medrl.rewards.compose import failure, name_of
from medrl.rewards.environment import reward_environment
from medrl.rewards.wire import pack, unpack

_LONGEST_REPLY = 1 << 20  # bytes; a score is a few hundred
_GLANCE_MS = 100  # how often a silent process is looked at: one that is dead has no more to say


@dataclass(frozen=True, slots=True)
class Setup:
    """What a process needs to know, and what it may use."""

    terms: tuple[tuple[str, float, dict[str, Any]], ...]  # (use, weight, options)
    mode: str
    policy: str
    timeout_s: float  # a completion
    start_timeout_s: float
    memory_bytes: int  # of address space


class _Lost(Exception):
    """The process gave no score. Never leaves this file."""

    def __init__(self, outcome: Outcome, reason: str) -> None:
        super().__init__(outcome, reason)
        self.outcome, self.reason = outcome, reason


class RewardProcess:
    """One slot of the pool. Used by one thread at a time; `close` may come from any other.

    A process is tied to the life of the thread that started it (that is what the kernel's
    parent-death signal looks at): call from threads that stay.
    """

    def __init__(self, setup: Setup, mark: str) -> None:
        self._setup = setup
        self._mark = mark  # in the environment of all that the process starts
        self._lock = threading.Lock()  # over _process, _link, _closed
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._running = mmap.mmap(-1, 1)  # the term it was in last, counted from 1; 0: none
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The process's id; None where none runs."""
        process = self._process
        return process.pid if process and not self._dead() else None

    def start(self) -> None:
        """Have a living process. Raises UserError for bad rewards, RewardError past the time."""
        if self._process and not self._dead():
            return
        self._kill()
        self._open()
        setup = self._setup
        try:
            self._send({"terms": setup.terms, "mode": setup.mode, "policy": setup.policy})
            problems = self._receive(setup.start_timeout_s)["problems"]
        except _Lost as lost:
            self._kill()
            raise RewardError(f"a reward process did not start: {lost.reason}") from None
        if problems:
            self._kill()
            raise UserError(*problems)

    def score(self, prompts: Sequence[Prompt], items: Sequence[tuple[int, str]]) -> list[Score]:
        """Score (prompt's number, completion) pairs in order; one Score each, whatever happens.

        Raises RewardError when closed meanwhile.
        """
        scores: list[Score] = []
        rows = [asdict(prompt) for prompt in prompts]
        while len(scores) < len(items):
            try:
                self.start()
            except (RewardError, UserError) as error:
                if self._closed:
                    raise
                return scores + [failure("error", str(error))] * (len(items) - len(scores))
            try:
                self._send({"prompts": rows, "items": items[len(scores) :]})
                while len(scores) < len(items):
                    scores.append(self._receive_score())
            except _Lost as lost:
                self._kill()
                scores.append(failure(lost.outcome, self._term() + lost.reason))
                with contextlib.suppress(RewardError, UserError):  # be whole for the next
                    self.start()
        return scores

    def close(self) -> None:
        """Leave no process. Safe to call twice, and from any thread."""
        with self._lock:
            self._closed = True
        self._kill()

    def _term(self) -> str:
        """Which reward the process was in when it was lost, or in last; empty: none."""
        number = self._running[0]
        return f"{name_of(self._setup.terms[number - 1][0])}: " if number else ""

    def _open(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile() as note, self._lock:
            if self._closed:
                ours.close()
                raise RewardError("the reward pool is closed")
            note.truncate(1)
            self._running = mmap.mmap(note.fileno(), 1)
            passed = [theirs.fileno(), note.fileno()]
            arguments = map(str, [*passed, os.getpid(), self._setup.memory_bytes])
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "medrl.rewards.worker", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=passed,
                env=reward_environment(os.environ) | {"MEDRL_REWARD_POOL": self._mark},
                start_new_session=True,  # its own group, killed as one; no Ctrl-C of a terminal
            )
            self._link = ours

    def _send(self, message: Any) -> None:
        link = self._open_link()
        try:
            link.settimeout(self._setup.start_timeout_s)
            link.sendall(pack(message))
        except OSError:
            raise self._lost() from None

    def _receive_score(self) -> Score:
        reply = self._receive(self._setup.timeout_s)
        try:
            return Score(**reply)
        except (TypeError, ValueError):
            raise _Lost("error", "the reward process answered nonsense") from None

    def _receive(self, timeout_s: float) -> Any:
        link, deadline = self._open_link(), time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(link, select.POLLIN)

        def receive(size: int) -> bytes:
            # The end of the stream is not enough to see a death by: a child that a reward forked
            # may hold the other end open.
            while not poll.poll(max(0.0, min(_GLANCE_MS, 1e3 * (deadline - time.monotonic())))):
                if self._dead():
                    raise self._lost()
                if time.monotonic() >= deadline:
                    raise _Lost("timeout", f"took longer than {timeout_s:g} s")
            return link.recv(size)

        try:
            return unpack(receive, _LONGEST_REPLY)
        except ValueError:
            raise _Lost("error", "the reward process answered nonsense") from None
        except (EOFError, OSError):
            raise self._lost() from None

    def _open_link(self) -> socket.socket:
        link = self._link  # once: `close` may take it away at any moment
        if link is None:
            raise _Lost("error", "the reward process was closed")
        return link

    def _dead(self) -> bool:
        """Look without reaping, so that the group's id stays ours until `_kill`."""
        process = self._process
        if process is None:
            return True
        try:
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, process.pid, flags) is not None
        except ChildProcessError:
            return True

    def _lost(self) -> _Lost:
        """Say how the process ended. Its link closes a moment before it can be waited for."""
        process, deadline = self._process, time.monotonic() + 1.0
        while not self._dead() and time.monotonic() < deadline:
            time.sleep(0.001)
        if process is None or not self._dead():
            return _Lost("error", "the reward process closed its link")
        self._kill()
        code = process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return _Lost("error", f"the reward process died: {how}")

    def _kill(self) -> None:
        with self._lock:
            process, link = self._process, self._link
            self._process = self._link = None
            if process is None:
                return
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if link is not None:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits on it
            link.close()
