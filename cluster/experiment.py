"""`medrl experiment`: many runs on engines that stay up, each evaluated on everything held out.

    EXPERIMENT/experiment.toml              as given, overrides applied
    EXPERIMENT/runs/<method>-<source>-sN/   a run directory, with result.json once it is done
    EXPERIMENT/report.html, tables.md, ...  what `reports.report_files` makes of them, after each

Called again it goes on: a run with result.json is done, one with a checkpoint is resumed, any
other starts anew. A sync brings each run's starting weights to the engines, as all others.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import tomli_w
from rich.console import Console

from medrl.actors.pool import EnginePool
from medrl.actors.sampler import Sampler
from medrl.actors.types import Prompt
from medrl.cluster.checkpoints import Checkpoints, read_driver_state
from medrl.cluster.display import Display
from medrl.cluster.engines import make_sampler, serving_engines
from medrl.cluster.evaluate import full_evaluation, write
from medrl.cluster.interrupt import Interrupt, Interrupted
from medrl.cluster.placement import Placement, cluster, placed
from medrl.cluster.preflight import check_inputs
from medrl.cluster.prepare import Prepared, prepare
from medrl.cluster.report import write_json
from medrl.cluster.requests import requests_of
from medrl.cluster.run import run_placed
from medrl.configs.errors import UserError
from medrl.configs.experiment import Experiment, Training, flat, load_experiment, slug
from medrl.configs.loader import did_you_mean, dump_config
from medrl.reports.lines import read_lines
from medrl.reports.plots import draw_plots
from medrl.reports.report_files import write_report

MAY_CHANGE = ("placement.", "run.wandb_project")
"""Keys, or their beginnings, that a later call may set otherwise. More seeds, sources and methods
may join, too; what is done stays as it is."""

LINES_A_RUN = 4  # where there is no terminal


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """An experiment whose input is right, and what is left of it."""

    experiment: Experiment
    trainings: tuple[Training, ...]
    todo: tuple[tuple[Training, Prepared], ...]


def plan(experiment: Experiment) -> Planned:
    """Check the data of every run that is left. Raises `UserError` with all problems."""
    _refuse_other_experiment(experiment)
    prompts = check_inputs(experiment.any_config, experiment.any_config.model.path).train
    trainings = tuple(experiment.trainings(_sources(experiment, prompts)))
    problems: dict[str, None] = {}
    todo = []
    for training in trainings:
        if (training.config.run_dir / "result.json").exists():
            continue
        try:
            todo.append((training, _prepare(training)))
        except UserError as error:
            problems |= dict.fromkeys(f"{training.label}: {text}" for text in error.problems)
    roots = sorted({str(prepared.checked.image_root) for _, prepared in todo})
    if len(roots) > 1:
        problems[
            f"data.train, data.test: the runs' images lie below different folders, "
            f"{' and '.join(roots)}, but engines that stay up read from one; name one that holds "
            "all of them as data.images"
        ] = None
    if problems:
        raise UserError(*problems)
    return Planned(experiment=experiment, trainings=trainings, todo=tuple(todo))


async def run_experiment(planned: Planned, console: Console) -> bool:
    """Do what is left. False where the user stopped it."""
    experiment = planned.experiment
    folder = experiment.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.toml").write_text(tomli_w.dumps(dict(experiment.tree)), encoding="utf-8")
    if planned.todo:
        interrupt = Interrupt()
        with cluster(experiment.any_config.placement), interrupt.listening(), suppress(Interrupted):
            async with placed(experiment.any_config) as placement:
                await _all_runs(planned, placement, interrupt, console)
        return not interrupt.requested
    write_report(folder)  # after each run it is written anyway
    return True


async def _all_runs(
    planned: Planned, placement: Placement, interrupt: Interrupt, console: Console
) -> None:
    experiment, todo = planned.experiment, planned.todo
    config, checked = experiment.any_config, todo[0][1].checked
    checked = replace(checked, max_images=max(run.checked.max_images for _, run in todo))
    logs = experiment.folder.absolute() / "logs"
    logs.mkdir(exist_ok=True)
    console.print(f"starting {config.placement.engines} engines for {len(todo)} runs")
    async with serving_engines(
        config, checked, placement, config.model.path, interrupt, logs
    ) as pool:
        all_runs = len(planned.trainings)
        for number, (training, prepared) in enumerate(todo, start=all_runs - len(todo) + 1):
            with Display(
                name=f"{number}/{all_runs} {training.label}",
                steps=prepared.config.run.steps,
                console=console,
                plain_lines=LINES_A_RUN,
            ) as display:
                kind = experiment.settings.sources
                one = _OneRun(training, prepared, kind, placement, interrupt, display)
                await one.go(pool)
            if training.method.train != "none" and not experiment.settings.keep_models:
                _delete_models(prepared.config.run_dir)
            write_report(experiment.folder)


@dataclass(frozen=True, slots=True)
class _OneRun:
    training: Training
    prepared: Prepared
    kind: str  # of the sources
    placement: Placement
    interrupt: Interrupt
    display: Display

    async def go(self, pool: EnginePool) -> None:
        """Train, evaluate, write the result. Raises `Interrupted` where a stop was asked for."""
        config = self.prepared.config
        began = time.monotonic() - earlier_seconds(self.prepared)

        async def finish(sampler: Sampler) -> None:
            await self._finish(sampler, time.monotonic() - began)

        if self.training.method.train == "none":
            config.run_dir.mkdir(parents=True, exist_ok=True)
            (config.run_dir / "config.toml").write_text(dump_config(config), encoding="utf-8")
            await finish(make_sampler(config, pool))
            return
        self.display.say(f"starting {config.placement.learners} learner ranks")
        await run_placed(
            self.prepared,
            self.display,
            self.placement,
            self.interrupt,
            pool=pool,
            then=finish,
        )
        if self.interrupt.requested:
            raise Interrupted
        draw_plots(config.run_dir)

    async def _finish(self, sampler: Sampler, seconds: float) -> None:
        """Evaluate what the engines serve now, and write the result: the run is done."""
        training = self.training
        config, prompts = self.prepared.config, self.prepared.checked.test
        self.display.say(f"evaluating {len(prompts)} held-out prompts")
        evaluation = await full_evaluation(
            prompts,
            requests_of(config, prompts),
            sampler,
            image_root=self.prepared.checked.image_root,
            blind=config.eval.blind,
            interrupt=self.interrupt,
        )
        trained = training.method.train != "none"
        numbers = write(evaluation, config.run_dir / "evals" / "final.json", mode=config.data.mode)
        result = {
            "method": training.method.name,
            "train": training.method.train,
            "mode": config.data.mode,
            "source": training.source,
            "source_kind": self.kind if training.source else "",
            "seed": training.seed,
            "steps": config.run.steps if trained else 0,
            "seconds": seconds if trained else 0.0,
            "evaluation": numbers,
        }
        write_json(config.run_dir / "result.json", result)
        self.display.note(
            f"held out: accuracy {numbers['accuracy']:.3f} ({numbers['low']:.3f} to "
            f"{numbers['high']:.3f}), format {numbers['format']:.3f}, n {numbers['n']}"
        )


def earlier_seconds(prepared: Prepared) -> float:
    """Spent before on the steps that a resumed run goes on from."""
    if not prepared.checkpoint:
        return 0.0
    done = read_driver_state(prepared.checkpoint).step
    steps = read_lines(prepared.config.run_dir / "metrics.jsonl")
    return sum((step["seconds.step"] for step in steps if step["step"] <= done), 0.0)


def _prepare(training: Training) -> Prepared:
    """As for a single run: resumed where there is a checkpoint, else begun anew."""
    run_dir = training.config.run_dir
    resume = Checkpoints(run_dir / "checkpoints", keep=1).latest() is not None
    if not resume:
        shutil.rmtree(run_dir, ignore_errors=True)  # it broke off before its first checkpoint
    return prepare(training.config, resume=resume)


def _sources(experiment: Experiment, prompts: Sequence[Prompt]) -> list[str]:
    """What to train on, a run each. Raises `UserError` where a named one is not in the data."""
    settings = experiment.settings
    if settings.sources == "all":
        return [""]
    there = sorted({getattr(prompt, settings.sources) for prompt in prompts})
    wrong = [
        f"experiment.only: no {settings.sources} {name!r} in the training data; "
        f"{did_you_mean(name, there)}"
        for name in settings.only
        if name not in there
    ]
    chosen = [name for name in there if not settings.only or name in settings.only]
    if len({slug(name) for name in chosen}) < len(chosen):
        wrong.append(f"experiment.sources: some of {chosen} would share a folder")
    if wrong:
        raise UserError(*wrong)
    return chosen


def _refuse_other_experiment(experiment: Experiment) -> None:
    """Raises `UserError` where the folder holds an experiment whose runs cannot be compared."""
    path = experiment.folder / "experiment.toml"
    if not path.exists():
        return
    before = load_experiment(path)
    changed = [
        f"{name}: {key}: {experiment.folder} was made with {then.get(key)!r}, now {value!r}; "
        "choose another experiment.name"
        for name, config in experiment.configs.items()
        if name in before.configs
        for then in [flat(before.configs[name].model_dump(mode="json"))]
        for key, value in flat(config.model_dump(mode="json")).items()
        if then.get(key) != value and not key.startswith(MAY_CHANGE)
    ]
    trains = {method.name: method.train for method in before.settings.methods}
    changed += [
        f"{method.name}: train: {experiment.folder} was made with {trains[method.name]!r}, now "
        f"{method.train!r}; choose another name for the method"
        for method in experiment.settings.methods
        if trains.get(method.name, method.train) != method.train
    ]
    if before.settings.sources != experiment.settings.sources:
        changed.append("experiment.sources: changed; choose another experiment.name")
    if changed:
        raise UserError(*changed)


def _delete_models(run_dir: Path) -> None:
    for name in ("export", "checkpoints"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
