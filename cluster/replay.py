"""`medrl replay`: a run once more, by the schedule its journal recorded, and what comes of it.

Everything is done again: engines sample, rewards score, the learner learns, weights are pushed. Of
the recorded run only config.toml, the schedule and the failed rewards are used; all else is
compared. The first step that differs ends it, for whatever follows is of other weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medrl.cluster.interrupt import Interrupt
from medrl.cluster.journal import Journal, Record
from medrl.cluster.loop import train
from medrl.cluster.placement import cluster, placed
from medrl.cluster.prepare import Prepared, prepare
from medrl.cluster.recording import START, RecordedStep, changed_start, read_recording
from medrl.cluster.replay_buffer import ReplayBuffer, ReplayScorer
from medrl.cluster.replay_compare import Comparison, compare_step
from medrl.cluster.requests import Requests, requests_of
from medrl.cluster.start import System, system
from medrl.cluster.trainers import parts_of
from medrl.configs.errors import UserError
from medrl.configs.loader import dump_config, load_config
from medrl.configs.schema import Config

MOVED = ("model.path", "data.train", "data.test", "data.images")
"""Beside section placement, what another machine may have elsewhere: it is compared."""

SHOWN = 5  # prompts that are no longer those of the run


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A replay that may start: nothing of the user's input is wrong."""

    run_dir: Path  # of the recorded run
    prepared: Prepared  # of the replay, in a directory of its own
    requests: Requests
    steps: Sequence[RecordedStep]

    @property
    def notes(self) -> Sequence[str]:
        """What a person should know before."""
        notes = list(self.prepared.checked.notes)
        if not self.prepared.config.run.deterministic:
            notes.append(
                "the run was without run.deterministic: engines round a completion by what they "
                "work on beside it, so a token may fall otherwise by chance"
            )
        if not (self.run_dir / START).is_file():
            notes.append(f"{self.run_dir} has no {START}, so the starting model is taken as it is")
        return notes


def prepare_replay(
    run_dir: Path, out: Path | None = None, steps: int = 0, overrides: Sequence[str] = ()
) -> Replay:
    """Check everything there is to check before an engine starts. Raises `UserError`.

    `out`: None for RUN-replay; `steps`: 0 for all."""
    if not (run_dir / "config.toml").is_file():
        raise UserError(f"{run_dir}: has no config.toml; name the directory of a run")
    _refuse_overrides(overrides)
    recorded = load_config(run_dir / "config.toml", overrides)
    if recorded.run.method == "sft":
        raise UserError(
            f"{run_dir}: is of supervised fine-tuning, which has no schedule to repeat: its steps "
            "go through the data in order, whatever the timing; run it again instead"
        )
    schedule = read_recording(run_dir, steps)
    whole = run_dir.resolve()
    where = (out or whole.with_name(f"{whole.name}-replay")).absolute()
    if where.exists():
        raise UserError(f"--out: {where} exists already; name a new folder, or delete it")
    prepared = prepare(_in_folder(recorded, where), resume=False)
    if changed := changed_start(run_dir, prepared.config.model.path):
        raise UserError(f"{changed}: the run started from another model, put that back")
    requests = requests_of(prepared.config, prepared.checked.train)
    _refuse_other_prompts(requests, schedule)
    return Replay(run_dir=run_dir, prepared=prepared, requests=requests, steps=schedule)


async def run_replay(
    replay: Replay, say: Callable[[str], None], on_step: Callable[[Comparison], None]
) -> None:
    """Do it, and tell `on_step` of each step. A stop raises `Interrupted`."""
    config, checked = replay.prepared.config, replay.prepared.checked
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.toml").write_text(dump_config(config), encoding="utf-8")
    interrupt = Interrupt()
    with cluster(config.placement), interrupt.listening():
        async with placed(config) as placement:
            say(f"starting {config.placement.engines} engines on {placement.device}s")
            async with system(config, checked, placement, replay.requests, interrupt) as parts:
                parts.pool.tell = parts.scorer.tell = lambda outage: say(str(outage))
                await interrupt.cancels(_repeat(replay, parts, on_step))


async def _repeat(replay: Replay, parts: System, on_step: Callable[[Comparison], None]) -> None:
    config, measured = replay.prepared.config, Measured()
    buffer, journal = ReplayBuffer(replay.steps), Journal(config.run_dir, [measured])

    async def after_step(step: int) -> None:
        was = replay.steps[step - 1].metrics
        compared = compare_step(replay.run_dir, config.run_dir, was, measured.last)
        on_step(compared)
        if not compared.same:
            await buffer.stop()
        journal.begin_step()

    journal.record_sync(await parts.sync.push(version=0, step=0))
    journal.begin_step()
    joined = parts_of(config, replay.requests, parts, journal, buffer, after_step)
    await train(dataclasses.replace(joined, scorer=ReplayScorer(joined.scorer, replay.steps)))


class Measured:
    """Keeps what the journal last wrote of a step."""

    last: Record

    def on_step(self, metrics: Record) -> None:
        self.last = metrics

    def on_eval(self, evaluation: Record) -> None:
        """There are none."""


def _in_folder(config: Config, folder: Path) -> Config:
    """The same run, there. Held-out data stays: the root of image paths follows from both sets."""
    where = {"dir": str(folder.parent), "name": folder.name}
    return config.model_copy(update={"run": config.run.model_copy(update=where)})


def _refuse_overrides(overrides: Sequence[str]) -> None:
    """What the losses follow from stays as it was."""
    problems = [
        f"{key}: a replay cannot change it; it can section placement, less placement.learners, and "
        + ", ".join(MOVED)
        for key in (text.partition("=")[0].strip() for text in overrides)
        if key not in MOVED and (key.split(".")[0] != "placement" or key == "placement.learners")
    ]
    if problems:
        raise UserError(*problems)


def _refuse_other_prompts(requests: Requests, steps: Sequence[RecordedStep]) -> None:
    """The draws of the run must be the prompts they were."""
    problems = []
    for group in (group for step in steps for group in step.groups):
        now = requests.train(group.draw)
        if (now.prompt.id, now.text) != (group.prompt_id, group.text):
            same = "with other words" if now.prompt.id == group.prompt_id else now.prompt.id
            problems.append(f"draw {group.draw}: was prompt {group.prompt_id}, is {same}")
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise UserError(
            *problems[:SHOWN], *more, "the data is not what the run was trained on; put that back"
        )
