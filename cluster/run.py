"""A training run from a checked config to its last file: start, loop, evaluate, export, stop."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medrl.actors.buffer import GroupBuffer
from medrl.cluster.checkpoints import (
    Checkpoints,
    DriverState,
    fixed_settings,
    read_driver_state,
    refuse_other_model,
    refuse_other_run,
    resume_from,
)
from medrl.cluster.display import Display
from medrl.cluster.evaluate import evaluate, summarize
from medrl.cluster.interrupt import Interrupt, Interrupted
from medrl.cluster.journal import Journal, Listener
from medrl.cluster.loop import Parts, train
from medrl.cluster.placement import cluster, placed
from medrl.cluster.plots import draw_plots
from medrl.cluster.preflight import Checked, check_inputs, refuse_used_directory
from medrl.cluster.publish import Prometheus, WeightsAndBiases
from medrl.cluster.requests import Requests
from medrl.cluster.start import System, engines_and_scorer, system
from medrl.configs.errors import (
    EngineError,
    MedrlError,
    RewardError,
    UserError,
    WeightSyncError,
)
from medrl.configs.loader import dump_config
from medrl.configs.schema import Config
from medrl.data.schedule import Schedule
from medrl.rewards.modes import get_mode
from medrl.rewards.scorer import StrictScorer


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run that may start: nothing of the user's input is wrong."""

    config: Config
    checked: Checked
    checkpoint: Path | None  # to go on from


def prepare(config: Config, *, resume: bool) -> Prepared:
    """Check everything there is to check before an engine starts. Raises `UserError`."""
    refuse_used_directory(config.run_dir, resume=resume)
    checked = check_inputs(config, config.model.path)
    checkpoint = None
    if resume:
        checkpoint = Checkpoints(config.run_dir / "checkpoints", keep=1).latest()
    if checkpoint:
        now = fixed_settings(config, len(checked.train))
        refuse_other_run(read_driver_state(checkpoint), now, checkpoint)
        refuse_other_model(checkpoint, config.model.path)
    return Prepared(config=config, checked=checked, checkpoint=checkpoint)


async def run_training(prepared: Prepared, display: Display) -> bool:
    """Train, evaluate, export. False where the user stopped it (a checkpoint was written)."""
    config = prepared.config
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.toml").write_text(dump_config(config), encoding="utf-8")
    interrupt = Interrupt()
    with cluster(config.placement), interrupt.listening():
        listeners: list[Listener] = [display, Prometheus(config.run.name)]
        wandb = WeightsAndBiases(config, config.run_dir) if config.run.wandb_project else None
        if wandb:
            listeners.append(wandb)
        try:
            with suppress(Interrupted):
                await _placed_run(prepared, display, listeners, interrupt)
        finally:
            if wandb:
                wandb.close()
    draw_plots(config.run_dir)
    return not interrupt.requested


async def _placed_run(
    prepared: Prepared, display: Display, listeners: Sequence[Listener], interrupt: Interrupt
) -> None:
    config, checked = prepared.config, prepared.checked
    requests = _requests(config, checked)
    async with placed(config.placement) as placement:
        display.say(
            f"starting {config.placement.engines} engines and {config.placement.learners} learner "
            f"ranks on {placement.device}s"
        )
        async with system(config, checked, placement, requests, interrupt) as parts:
            run = Run(prepared, requests, parts, Journal(config.run_dir, listeners), display)
            interrupt.on_request(run.stop)
            await run.go(interrupt)


class Run:
    """The parts of a run while it runs."""

    def __init__(
        self,
        prepared: Prepared,
        requests: Requests,
        system: System,
        journal: Journal,
        display: Display,
    ) -> None:
        config = prepared.config
        self._config = config
        self._prepared = prepared
        self._requests = requests
        self._system = system
        self._strict = StrictScorer(config.data.mode)
        self._journal = journal
        self._display = display
        self._checkpoints = Checkpoints(config.run_dir / "checkpoints", config.run.keep_checkpoints)
        self._buffer = GroupBuffer(
            prompts=config.rollout.prompts,
            staleness=config.rollout.staleness,
            total_batches=config.run.steps,
        )
        self._stopping: asyncio.Task[None] | None = None
        self._evaluated: int | None = None  # the step of the last evaluation

    def stop(self) -> None:
        """Have the loop end after the step it is in."""
        self._stopping = asyncio.ensure_future(self._buffer.stop())

    async def go(self, interrupt: Interrupt) -> None:
        """Resume where there is a checkpoint, train, evaluate, export. A stop leaves one."""
        if self._prepared.checkpoint:
            await resume_from(self._prepared.checkpoint, self._buffer, self._system.learner)
            self._checkpoints.last_saved = self._buffer.version
            self._display.say(f"resumed from {self._prepared.checkpoint}")
        self._journal.rewind(self._buffer.version)
        try:
            await self._train(interrupt)
        except (Interrupted, EngineError, RewardError):
            await self._save()  # met between updates, when weights, version and buffer agree
            raise
        except (WeightSyncError, UserError):
            # After an update its weights may be saved though they did not reach the engines; the
            # learner itself may be what broke, and must not hide why.
            if self._buffer.settled and self._buffer.version:
                with suppress(MedrlError, TimeoutError):
                    async with asyncio.timeout(self._config.placement.sync_timeout_s):
                        await self._save()
            raise
        await self._save()
        if not interrupt.requested:
            await self._export()

    async def _train(self, interrupt: Interrupt) -> None:
        first = self._buffer.version
        # Engines serve nothing before a receipt, the starting model included.
        receipt = await self._system.sync.push(version=first, step=first)
        self._journal.record_sync(receipt)

        async def after_step(step: int) -> None:
            every = self._config.run.checkpoint_every
            if every and step % every == 0:
                await self._save()
            if self._config.eval.every and step % self._config.eval.every == 0:
                await self._evaluate(step, interrupt)
            self._journal.begin_step()

        if first == 0:
            await self._evaluate(0, interrupt)
        self._system.sampler.take_idle_seconds()
        self._journal.begin_step()
        await train(
            Parts(
                request=self._requests.train,
                sampler=self._system.sampler,
                scorer=self._system.scorer,
                buffer=self._buffer,
                learner=self._system.learner,
                sync=self._system.sync,
                journal=self._journal,
                after_step=after_step,
                max_failed_fraction=self._config.reward.max_failed_fraction,
                take_turns=self._config.placement.colocate,
            )
        )
        if interrupt.requested:
            raise Interrupted
        await self._evaluate(self._buffer.version, interrupt)

    async def _evaluate(self, step: int, interrupt: Interrupt) -> None:
        prompts = self._prepared.checked.test
        if not prompts or step == self._evaluated:
            return
        self._display.say(f"evaluating {len(prompts)} held-out prompts")
        groups = await interrupt.cancels(
            evaluate(prompts, self._requests.greedy, self._system.sampler, self._strict)
        )
        self._journal.record_eval(summarize(step, "test", groups))
        self._evaluated = step

    async def _save(self) -> None:
        step = self._buffer.version
        if self._checkpoints.last_saved == step:
            return
        state = DriverState(
            step=step,
            fixed=fixed_settings(self._config, len(self._prepared.checked.train)),
            buffer=self._buffer.state(),
        )
        await self._checkpoints.save(state, self._system.learner)

    async def _export(self) -> None:
        final, aside = self._config.run_dir / "export", self._config.run_dir / ".export"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        await self._system.learner.export(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)


def run_evaluation(config: Config, checkpoint: Path) -> dict[str, Any]:
    """The held-out numbers of a checkpoint, an export or any model folder. Raises `UserError`."""
    if not checkpoint.exists():
        raise UserError(f"--checkpoint: {checkpoint} does not exist")
    inside = checkpoint / "learner" / "model"
    model = str(inside if inside.exists() else checkpoint)
    checked = check_inputs(config, model, evaluation_only=True)
    return asyncio.run(_evaluate_model(config, checked, model))


async def _evaluate_model(config: Config, checked: Checked, model: str) -> dict[str, Any]:
    interrupt = Interrupt()
    requests = _requests(config, checked)
    with cluster(config.placement), interrupt.listening():
        async with (
            placed(config.placement) as placement,
            engines_and_scorer(config, checked, placement, model, interrupt) as (sampler, scorer),
        ):
            groups = await interrupt.cancels(
                evaluate(checked.test, requests.greedy, sampler, scorer)
            )
    return {"checkpoint": model} | summarize(0, "test", groups)


def _requests(config: Config, checked: Checked) -> Requests:
    prompts = checked.train or checked.test  # an evaluation loads no training prompts
    return Requests(
        prompts=prompts,
        schedule=Schedule(len(prompts), config.run.seed),
        mode=get_mode(config.data.mode),
        rollout=config.rollout,
        seed=config.run.seed,
    )
