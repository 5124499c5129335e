"""Checkpoints of a run: whole or not there.

    RUN/checkpoints/step_N/learner/...   what the learner saves (weights in learner/model)
    RUN/checkpoints/step_N/driver.json   step, data position, buffer, what the model was
    RUN/checkpoints/step_N/manifest.json size and digest of every other file, written last

Written into a hidden folder beside, then renamed: a folder named step_N was complete. Whether it
still is its manifest tells: one that is not is set aside, as step_N.damaged, for the one before.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from medrl.actors.buffer import BufferState
from medrl.cluster.manifest import damage, flush, seal
from medrl.configs.errors import CheckpointError, UserError
from medrl.configs.schema import Config
from medrl.learner.learner import Learner

FIXED_KEYS = (
    "run.method",
    "run.seed",
    "run.deterministic",
    "model.path",
    "data.train",
    "data.mode",
    "data.instruction",
    "data.order",
    "data.pass_rates",
    "data.min_pass_rate",
    "data.max_pass_rate",
    "rollout.prompts",
    "rollout.completions",
    "rollout.staleness",
    "rollout.max_replaced",
    "reward.policy",
    "model.dtype",
    "model.freeze_vision",
    "model.lora_rank",
    "model.lora_alpha",
    "model.lora_vision",
    "learner.zero_stage",
    "placement.learners",
)
"""What a resumed run may not change: schedule, random streams, buffer and the learner's own files
follow from them."""

Fixed = dict[str, str | bool | int | float]


@dataclass(frozen=True, kw_only=True)
class DriverState:
    """What the driver needs to go on."""

    step: int
    fixed: Fixed  # FIXED_KEYS, and the number of training prompts
    buffer: BufferState


class Resumable(Protocol):
    """A buffer, or a trainer that has one."""

    def restore(self, state: BufferState) -> None: ...


_driver_state = TypeAdapter(DriverState)


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self.last_saved: int | None = None  # step

    async def save(self, state: DriverState, learner: Learner) -> Path:
        """Write a checkpoint of `state.step` and delete all but the newest `keep` whole ones.

        Raises `CheckpointError` where the disk does not take it; those before stay as they are."""
        final = self._folder / f"step_{state.step}"
        aside = self._folder / f".step_{state.step}"
        try:
            await asyncio.to_thread(self._sweep)
            (aside / "learner").mkdir(parents=True)
            await learner.save(aside / "learner")
            (aside / "driver.json").write_bytes(_driver_state.dump_json(state))
            await asyncio.to_thread(seal, aside)
            if final.exists():  # of a run whose time was turned back: not ours to delete
                _set_aside(final, "replaced")
            aside.rename(final)
            flush(self._folder)
        except (OSError, CheckpointError) as error:
            shutil.rmtree(aside, ignore_errors=True)  # it may be what fills the disk
            raise CheckpointError(
                f"the checkpoint of step {state.step} could not be written: {error}; if the "
                f"disk of {self._folder} is full, make room; those before it are untouched"
            ) from error
        self.last_saved = state.step
        await asyncio.to_thread(self._prune)
        return final

    def steps(self) -> list[int]:
        """Steps there is a checkpoint of, oldest first."""
        names = (path.name.removeprefix("step_") for path in self._folder.glob("step_*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def latest(self) -> Path | None:
        """The newest, whole or not."""
        steps = self.steps()
        return self._folder / f"step_{steps[-1]}" if steps else None

    def newest_whole(self) -> tuple[Path | None, Sequence[str]]:
        """The checkpoint to go on from (None: there are none at all), and a sentence for each newer
        one that is damaged and was therefore set aside.

        Reads all bytes of it, and blocks. Raises `UserError` where there are some and none is
        whole; nothing is renamed then."""
        damaged: list[tuple[Path, str]] = []
        for step in reversed(self.steps()):
            folder = self._folder / f"step_{step}"
            if not (problem := damage(folder)):
                return folder, [
                    f"checkpoint {path} is damaged: {why}; it is now {_set_aside(path, 'damaged')}"
                    for path, why in damaged
                ]
            damaged.append((folder, problem))
        if damaged:
            raise UserError(
                *(f"checkpoint {path} is damaged: {why}" for path, why in damaged),
                f"no checkpoint in {self._folder} is whole, so the run cannot go on: put one back "
                "from a copy, or start anew under another run.name",
            )
        return None, ()

    def _sweep(self) -> None:
        """Delete what an attempt that was cut off left, and what `_prune` did not get to."""
        for path in self._folder.glob(".step_*"):
            shutil.rmtree(path)

    def _prune(self) -> None:
        """Delete old checkpoints. Never a damaged one: somebody may want to look at it."""
        folders = (self._folder / f"step_{step}" for step in self.steps())
        whole = [folder for folder in folders if not damage(folder, digests=False)]
        for folder in whole[: -self._keep]:
            gone = folder.with_name(f".{folder.name}")
            folder.rename(gone)  # at no moment half a checkpoint by a checkpoint's name
            shutil.rmtree(gone)


def read_driver_state(checkpoint: Path) -> DriverState:
    """Raises `CheckpointError` where driver.json is missing or broken."""
    try:
        return _driver_state.validate_json((checkpoint / "driver.json").read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read: {error}") from None


def fixed_settings(config: Config, num_train_prompts: int) -> Fixed:
    """What of a run must be as it was for its checkpoints to go on."""
    tree = config.model_dump(mode="json")
    values = {key: tree[key.partition(".")[0]][key.partition(".")[2]] for key in FIXED_KEYS}
    return values | {"training prompts": num_train_prompts}


def refuse_other_run(state: DriverState, now: Fixed, checkpoint: Path) -> None:
    """Raises `UserError` naming each setting that differs from the checkpoint's."""
    different = [
        f"{key}: {checkpoint} was made with {then!r}, now {now.get(key)!r}; a resumed run cannot "
        "change it"
        for key, then in state.fixed.items()
        if now.get(key) != then
    ]
    if different:
        raise UserError(*different)


def refuse_other_model(checkpoint: Path, model: str) -> None:
    """Raises `UserError` where the folder `model` holds other tensors than the checkpoint's. A name
    on the hub is left to the learner, which compares again."""
    saved, here = checkpoint / "learner" / "model", Path(model)
    if not here.is_dir():
        return
    there, now = tensor_shapes(saved), tensor_shapes(here)
    odd = sorted(name for name in there | now if there.get(name) != now.get(name))
    if odd:
        raise UserError(
            f"{checkpoint} is of another model than model.path {model}: {len(odd)} tensors differ, "
            f"first {odd[0]}, {there.get(odd[0], 'absent')} and {now.get(odd[0], 'absent')}"
        )


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Name -> shape of the weights in a Hugging Face folder; reads the files' headers only."""
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes


async def resume_from(checkpoint: Path, buffer: Resumable, learner: Learner) -> None:
    """Bring buffer and learner to where the checkpoint was made."""
    buffer.restore(read_driver_state(checkpoint).buffer)
    await learner.load(checkpoint / "learner")


def _set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint so that it is none, to a name that is free."""
    names = (f"{folder.name}.{why}{number or ''}" for number in range(1000))
    free = next(folder.with_name(name) for name in names if not folder.with_name(name).exists())
    return folder.rename(free)
