"""A learner that saves several files slowly, and a process of its own to kill while it does."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

from medrl.actors.buffer import BufferState
from medrl.actors.fake_engine import FakeWire
from medrl.cluster.checkpoints import Checkpoints, DriverState
from medrl.learner.fake_learner import FakeLearner

FILES = ("model/model.safetensors", "state/optimizer.bin", "rng_0.bin")
CHUNK, CHUNKS = 1 << 14, 4  # bytes, and how many a file has


class SlowLearner(FakeLearner):
    """A checkpoint of step N is files full of N."""

    def __init__(self, step: int = 0, pause_s: float = 0.0) -> None:
        super().__init__(FakeWire(), skill=0.5, learning_rate=0.1)
        self.updates, self._pause_s = step, pause_s

    async def save(self, folder: Path) -> None:
        for name in FILES:
            (folder / name).parent.mkdir(exist_ok=True)
            with (folder / name).open("wb") as file:
                for _ in range(CHUNKS):
                    file.write(bytes([self.updates % 256]) * CHUNK)
                    file.flush()
                    await asyncio.sleep(self._pause_s)


def state(step: int) -> DriverState:
    buffer = BufferState(version=step, next_draw=step, started={}, ready=())
    return DriverState(step=step, fixed={}, buffer=buffer)


def save(folder: Path, step: int, *, keep: int = 2, pause_s: float = 0.0) -> Path:
    learner = SlowLearner(step, pause_s)
    return asyncio.run(Checkpoints(folder, keep).save(state(step), learner))


def holds_one_step(checkpoint: Path) -> bool:
    """Whether every byte is of the step that the name says."""
    step = int(checkpoint.name.removeprefix("step_"))
    want = bytes([step % 256]) * CHUNK * CHUNKS
    return all((checkpoint / "learner" / name).read_bytes() == want for name in FILES)


def in_process(job: Callable[[int], None]) -> tuple[multiprocessing.Process, int]:
    """Run `job` in a fork with the writing end of a pipe; returns both, with the reading end."""
    reading, writing = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=job, args=(writing,))
    process.start()
    os.close(writing)
    return process, reading
