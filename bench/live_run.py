"""A real run that makes a step when it is told to: engines, ranks, rewards, journal, all of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from medrl.actors.buffer import BufferState
from medrl.cluster.interrupt import Interrupt
from medrl.cluster.journal import Journal
from medrl.cluster.placement import cluster, placed
from medrl.cluster.prepare import prepare
from medrl.cluster.requests import Requests, requests_of
from medrl.cluster.start import System, system
from medrl.cluster.trainers import make_trainer
from medrl.configs.schema import Config
from medrl.reports.lines import read_lines


class LiveRun:
    """Between two steps nothing of it works: the engines serve what the last step learnt."""

    def __init__(self, config: Config, requests: Requests, parts: System) -> None:
        self.config = config
        self._requests = requests
        self._parts = parts
        self._journal = Journal(config.run_dir)
        self._state: BufferState | None = None  # after the last step

    async def begin(self) -> None:
        """Engines serve nothing before a receipt, the starting model included."""
        receipt = await self._parts.sync.push(version=0, step=0)
        self._journal.record_sync(receipt)

    async def step(self) -> dict[str, Any]:
        """Rollout, rewards, update and push of one batch; its line of the journal."""
        version = self._state.version if self._state else 0
        once = self.config.run.model_copy(update={"steps": version + 1})
        config = self.config.model_copy(update={"run": once})
        trainer = make_trainer(config, self._requests, self._parts, self._journal)
        if self._state:
            trainer.restore(self._state)
        self._journal.begin_step()
        await trainer.train(_nothing)
        self._state = trainer.state()
        line: dict[str, Any] = read_lines(self.config.run_dir / "metrics.jsonl")[-1]
        return line


async def _nothing(step: int) -> None:
    return None


@asynccontextmanager
async def live_run(config: Config) -> AsyncIterator[LiveRun]:
    """For the block. `config.run.steps` is no limit, only the length of the learning rate's way."""
    prepared = prepare(config, resume=False)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    interrupt = Interrupt()
    requests = requests_of(config, prepared.checked.train)
    with cluster(config.placement):
        async with (
            placed(config) as placement,
            system(config, prepared.checked, placement, requests, interrupt) as parts,
        ):
            run = LiveRun(config, requests, parts)
            await run.begin()
            yield run
