"""A training run from a checked config to its last file: start, train, evaluate, export, stop."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from medrl.actors.pool import EnginePool, Outage
from medrl.actors.sampler import Sampler
from medrl.cluster.alarms import make_alarms
from medrl.cluster.checkpoints import (
    Checkpoints,
    DriverState,
    fixed_settings,
    resume_from,
)
from medrl.cluster.crashes import Crashes
from medrl.cluster.display import Display
from medrl.cluster.evaluate import evaluate
from medrl.cluster.interrupt import Interrupt, Interrupted
from medrl.cluster.journal import Journal, Listener
from medrl.cluster.placement import Placement, cluster, placed
from medrl.cluster.prepare import Prepared
from medrl.cluster.publish import Prometheus, WeightsAndBiases
from medrl.cluster.recording import record_start
from medrl.cluster.requests import Requests, requests_of
from medrl.cluster.start import System, system
from medrl.cluster.startup import Startup, process_start
from medrl.cluster.trainers import make_trainer
from medrl.configs.errors import (
    CheckpointError,
    EngineError,
    GapError,
    LearnerError,
    MedrlError,
    RewardError,
    UserError,
    WeightSyncError,
)
from medrl.configs.loader import dump_config
from medrl.learner.settings import dtype_of
from medrl.reports.breakdown import summarize
from medrl.reports.plots import draw_plots
from medrl.rewards.scorer import StrictScorer

T = TypeVar("T")


async def run_training(prepared: Prepared, display: Display) -> bool:
    """Train, evaluate, export. False where the user stopped it (a checkpoint was written)."""
    placement_config = prepared.config.placement
    interrupt, startup = Interrupt(), Startup(process_start())
    startup.reached("imports and checks")
    with cluster(placement_config), interrupt.listening(), suppress(Interrupted):
        async with placed(prepared.config) as placement:
            startup.reached("Ray")
            display.say(
                f"starting {placement_config.engines} engines and {placement_config.learners} "
                f"learner ranks on {placement.device}s"
            )
            await run_placed(prepared, display, placement, interrupt, startup=startup)
    draw_plots(prepared.config.run_dir)
    return not interrupt.requested


async def run_placed(
    prepared: Prepared,
    display: Display,
    placement: Placement,
    interrupt: Interrupt,
    *,
    pool: EnginePool | None = None,
    then: Callable[[Sampler], Awaitable[None]] | None = None,
    startup: Startup | None = None,
) -> None:
    """A whole run in resources that are held; raises `Interrupted` after a stop's checkpoint.

    `pool`: of engines that are up already, and stay so; None: the run's own. `then`: what to do
    with them at the end, while they serve the last version; the run itself then evaluates only
    where `eval.every` asks for it. `startup`: began before; None: begins now.
    """
    startup = startup or Startup()
    config, checked = prepared.config, prepared.checked
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.toml").write_text(dump_config(config), encoding="utf-8")
    if not prepared.checkpoint:
        await asyncio.to_thread(record_start, config.run_dir, config.model.path)
    listeners: list[Listener] = [display, Prometheus(config.run.name)]
    wandb = WeightsAndBiases(config, config.run_dir) if config.run.wandb_project else None
    if wandb:
        listeners.append(wandb)
    requests = requests_of(config, checked.train)
    alarms = make_alarms(config, dtype_of(config.model, placement.device), display.note)
    try:
        async with system(config, checked, placement, requests, interrupt, pool, startup) as parts:
            journal = Journal(config.run_dir, listeners, alarms)
            run = Run(prepared, requests, parts, journal, display, interrupt, startup)
            interrupt.on_request(run.stop)
            await run.go(then)
    finally:
        if wandb:
            wandb.close()


class Run:
    """The parts of a run while it runs."""

    def __init__(
        self,
        prepared: Prepared,
        requests: Requests,
        system: System,
        journal: Journal,
        display: Display,
        interrupt: Interrupt,
        startup: Startup | None = None,
    ) -> None:
        config = prepared.config
        self._startup = startup or Startup()
        self._config = config
        self._interrupt = interrupt
        self._prepared = prepared
        self._requests = requests
        self._system = system
        self._strict = StrictScorer(config.data.mode)
        self._journal = journal
        self._display = display
        self._checkpoints = Checkpoints(config.run_dir / "checkpoints", config.run.keep_checkpoints)
        self._trainer = make_trainer(config, requests, system, journal)
        self._served: int | None = None  # the version a receipt of this run proves
        self._stopping: asyncio.Task[None] | None = None
        self._crashes = Crashes()
        system.pool.tell = system.scorer.tell = self._tell
        self._evaluated: int | None = None  # the step of the last evaluation

    def stop(self) -> None:
        """Have the loop end after the step it is in."""
        self._stopping = asyncio.ensure_future(self._trainer.stop())
        self._system.pool.stop("the run was asked to stop")

    async def go(self, then: Callable[[Sampler], Awaitable[None]] | None) -> None:
        """Resume where there is a checkpoint, train, evaluate, export. A stop leaves one.

        A learner that dies on the way is started again. `then`: as for `run_placed`."""
        checkpoint = self._prepared.checkpoint
        for sentence in self._prepared.damaged:
            self._display.note(sentence)
        if checkpoint:
            self._display.say(f"resuming from {checkpoint}")
        restore = self._restore(checkpoint)
        while True:
            try:
                await restore
                return await self._go(then)
            except LearnerError as error:
                if not error.died:
                    raise
                restore = self._recover(error)

    async def _restore(self, checkpoint: Path | None) -> None:
        """Be where the checkpoint was made; None: at the start, where the learner is."""
        self._trainer = make_trainer(self._config, self._requests, self._system, self._journal)
        if checkpoint:
            await resume_from(checkpoint, self._trainer, self._system.learner)
        self._checkpoints.last_saved = self._trainer.version if checkpoint else None
        self._journal.rewind(self._trainer.version)
        self._served = None
        if self._evaluated and self._evaluated > self._trainer.version:
            self._evaluated = None

    async def _recover(self, death: LearnerError) -> None:
        """A learner died: bring all of it back, as the last whole checkpoint has it."""
        began, cause = time.monotonic(), str(death).partition("\n")[0]
        self._tell(Outage(who="learner", event="left", cause=cause))
        self._crashes.add(self._trainer.version, death)
        await self._interrupt.cancels(self._system.learner.restart())
        self._system.sync.close_group()
        checkpoint, damaged = await asyncio.to_thread(self._checkpoints.newest_whole)
        await self._restore(checkpoint)
        out_s = time.monotonic() - began
        self._tell(Outage(who="learner", event="returned", cause=cause, seconds=out_s))
        for sentence in (*damaged, f"going on from step {self._trainer.version}"):
            self._display.note(sentence)

    async def _go(self, then: Callable[[Sampler], Awaitable[None]] | None) -> None:
        try:
            await self._train(ends_evaluated=then is None or bool(self._config.eval.every))
        except (Interrupted, EngineError, GapError, RewardError):
            await self._save()  # met between updates, when weights, version and buffer agree
            if self._interrupt.requested:
                raise Interrupted from None
            raise
        except LearnerError as error:
            # One that refused a batch made no optimiser step, or some of several.
            if not error.died and not error.half_way:
                await self._try_to_save()
            raise
        except (WeightSyncError, UserError):
            # After an update its weights may be saved though they did not reach the engines.
            if self._trainer.settled and self._trainer.version:
                await self._try_to_save()
            raise
        await self._save()
        if self._interrupt.requested:
            return
        self._journal.conclude()
        await self._export()
        if then:
            await self._serving(then(self._system.sampler))

    async def _serving(self, work: Awaitable[T]) -> T:
        """Do `work` with engines that serve the learner's weights, those started again too."""
        await self._bring()
        return await self._system.sync.attend(work, self._journal.record_sync)

    async def _bring(self) -> None:
        """Have the engines serve the learner's weights, where they do not yet."""
        version = self._trainer.version
        if self._served != version:
            self._journal.record_sync(await self._system.sync.push(version=version, step=version))
            self._served = version
            self._startup.reached("first sync")

    async def _train(self, *, ends_evaluated: bool) -> None:
        """`ends_evaluated`: evaluate before the first and after the last step."""

        async def after_step(step: int) -> None:
            if self._trainer.pushes:
                self._served = step
                self._write_startup()
            self._journal.refuse_gap()
            every = self._config.run.checkpoint_every
            if (every and step % every == 0) or step == self._crashes.furthest:
                try:
                    await self._save()
                except CheckpointError as error:
                    # What is in memory is worth more than a stop that could not save it either:
                    # there is time to make room until the next, and the last one must succeed.
                    self._display.note(f"{error}; training goes on")
            if self._config.eval.every and step % self._config.eval.every == 0:
                await self._evaluate(step)
            self._journal.begin_step()

        if self._interrupt.requested:
            raise Interrupted  # while the learner came back
        if self._trainer.pushes:
            # Engines serve nothing before a receipt, the starting model included.
            await self._bring()
        version, every = self._trainer.version, self._config.eval.every
        # Killed after a step's checkpoint and before its evaluation, a run owes that.
        owed = every and version % every == 0 and not self._journal.has_eval(version)
        if owed if version else ends_evaluated:
            await self._evaluate(version)
        self._journal.begin_step()
        await self._trainer.train(after_step)
        if self._interrupt.requested:
            raise Interrupted
        if ends_evaluated:
            await self._evaluate(self._trainer.version)

    async def _evaluate(self, step: int) -> None:
        prompts = self._prepared.checked.test
        if not prompts or step == self._evaluated:
            return
        self._display.say(f"evaluating {len(prompts)} held-out prompts")
        answers = evaluate(prompts, self._requests.greedy, self._system.sampler, self._strict)
        groups = await self._interrupt.cancels(self._serving(answers))
        self._journal.record_eval(summarize(step, "test", groups))
        self._evaluated = step
        self._write_startup()

    def _write_startup(self) -> None:
        self._startup.write(self._config.run_dir, self._system.sampler.first_answer)

    def _tell(self, outage: Outage) -> None:
        self._journal.record_outage(self._trainer.version, outage)
        self._display.note(str(outage))

    async def _try_to_save(self) -> None:
        """On the way out: the learner itself may be what broke, and must not hide why."""
        with suppress(MedrlError, TimeoutError):
            async with asyncio.timeout(self._config.placement.sync_timeout_s):
                await self._save()

    async def _save(self) -> None:
        step = self._trainer.version
        if self._checkpoints.last_saved == step:
            return
        state = DriverState(
            step=step,
            fixed=fixed_settings(self._config, len(self._prepared.checked.train)),
            buffer=self._trainer.state(),
        )
        await self._checkpoints.save(state, self._system.learner)

    async def _export(self) -> None:
        final, aside = self._config.run_dir / "export", self._config.run_dir / ".export"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        await self._system.learner.export(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
