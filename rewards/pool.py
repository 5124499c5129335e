"""Processes that score completions and can be killed: a reward that hangs, crashes or eats memory
costs its completion, not the run.

Why not a `ProcessPoolExecutor`: it cannot kill one task, and one dead process breaks it whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

from medrl.actors.types import Prompt, Score
from medrl.configs.errors import RewardError
from medrl.rewards.compose import Term
from medrl.rewards.process import RewardProcess, Setup

_MEMORY_BYTES = 8 << 30  # of address space a process: torch takes 1 GiB of it by being imported
_CHUNK = 200  # completions a message


class RewardPool:
    """Scores groups, each in one process. Blocks until all processes are ready.

    Raises UserError where a reward cannot be resolved, RewardError where no process comes up.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        mode: str,
        processes: int = 2,
        timeout_s: float = 5.0,
        *,
        policy: str = "strict",
        start_timeout_s: float = 60.0,
        memory_bytes: int = _MEMORY_BYTES,
        mark: str = "",
    ) -> None:
        """`mark`: of a pool that this one stands in for; what that may have left is ended first."""
        plain = tuple((term.use, term.weight, dict(term.options)) for term in terms)
        setup = Setup(plain, mode, policy, timeout_s, start_timeout_s, memory_bytes)
        if mark:
            _kill_marked(mark)
        self._mark = mark or uuid.uuid4().hex
        self._slots = [RewardProcess(setup, self._mark) for _ in range(processes)]
        self._free: queue.SimpleQueue[RewardProcess] = queue.SimpleQueue()
        # A thread a slot, and all processes are started from these: see RewardProcess.
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="medrl-reward")
        self._closed = False
        starts = [self._threads.submit(slot.start) for slot in self._slots]
        try:
            for start in starts:
                start.result()
        except BaseException:
            self.close()
            raise
        for slot in self._slots:
            self._free.put(slot)

    @property
    def pids(self) -> tuple[int, ...]:
        """Ids of the living processes."""
        return tuple(pid for slot in self._slots if (pid := slot.pid) is not None)

    async def score(self, prompt: Prompt, completions: Sequence[str]) -> tuple[Score, ...]:
        """Score a prompt's completions, in order. Each has `timeout_s`."""
        items = [(0, completion) for completion in completions]
        if self._closed:
            raise RewardError("the reward pool is closed")
        loop = asyncio.get_running_loop()
        return tuple(await loop.run_in_executor(self._threads, self._run, [prompt], items))

    def score_pairs(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Score]:
        """Score (prompt, completion) pairs in order, over all processes. Blocks."""
        if self._closed:
            raise RewardError("the reward pool is closed")
        futures = []
        for start in range(0, len(pairs), _CHUNK):
            chunk = pairs[start : start + _CHUNK]
            items = [(number, completion) for number, (_, completion) in enumerate(chunk)]
            futures.append(self._threads.submit(self._run, [prompt for prompt, _ in chunk], items))
        return [score for future in futures for score in future.result()]

    def _run(self, prompts: Sequence[Prompt], items: Sequence[tuple[int, str]]) -> list[Score]:
        slot = self._free.get()  # never waits: there are as many threads as slots
        try:
            return slot.score(prompts, items)
        finally:
            self._free.put(slot)

    def close(self) -> None:
        """Kill all processes. Safe to call twice; scores that are awaited raise RewardError."""
        self._closed = True
        for slot in self._slots:
            slot.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
        _kill_marked(self._mark)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _kill_marked(mark: str) -> None:
    """Kill what rewards started and moved out of their process group (Linux)."""
    wanted = f"MEDRL_REWARD_POOL={mark}".encode()
    for _ in range(2):  # twice: a program that has only just started shows no environment yet
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # gone, or somebody else's
                if wanted in environment.read_bytes().split(b"\0"):
                    os.kill(int(environment.parent.name), signal.SIGKILL)
        time.sleep(0.01)
