"""Checkpoints of a run: whole or not there.

    RUN/checkpoints/step_N/learner/...   what the learner saves (weights in learner/model)
    RUN/checkpoints/step_N/driver.json   step, data position, buffer, what the model was

Written into a hidden folder beside, then renamed: a folder named step_N is complete.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from medrl.actors.buffer import BufferState, GroupBuffer
from medrl.configs.errors import CheckpointError, UserError
from medrl.configs.schema import Config
from medrl.learner.learner import Learner

FIXED_KEYS = (
    "run.seed",
    "model.path",
    "data.train",
    "data.mode",
    "rollout.prompts",
    "rollout.completions",
    "rollout.staleness",
    "reward.policy",
    "model.dtype",
    "model.freeze_vision",
    "learner.zero_stage",
    "placement.learners",
)
"""What a resumed run may not change: schedule, random streams, buffer and the learner's own files
follow from them."""


@dataclass(frozen=True, kw_only=True)
class DriverState:
    """What the driver needs to go on."""

    step: int
    fixed: dict[str, str | int]  # FIXED_KEYS, and the number of training prompts
    buffer: BufferState


_driver_state = TypeAdapter(DriverState)


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self.last_saved: int | None = None  # step

    async def save(self, state: DriverState, learner: Learner) -> Path:
        """Write a checkpoint of `state.step` and delete all but the newest `keep`."""
        final = self._folder / f"step_{state.step}"
        aside = self._folder / f".step_{state.step}"
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "learner").mkdir(parents=True)
        await learner.save(aside / "learner")
        (aside / "driver.json").write_bytes(_driver_state.dump_json(state))
        _flush(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        self.last_saved = state.step
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self._folder / f"step_{old}")
        return final

    def steps(self) -> list[int]:
        """Steps there is a checkpoint of, oldest first."""
        names = (path.name.removeprefix("step_") for path in self._folder.glob("step_*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def latest(self) -> Path | None:
        steps = self.steps()
        return self._folder / f"step_{steps[-1]}" if steps else None


def read_driver_state(checkpoint: Path) -> DriverState:
    """Raises `CheckpointError` where driver.json is missing or broken."""
    try:
        return _driver_state.validate_json((checkpoint / "driver.json").read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read: {error}") from None


def fixed_settings(config: Config, num_train_prompts: int) -> dict[str, str | int]:
    """What of a run must be as it was for its checkpoints to go on."""
    tree = config.model_dump(mode="json")
    values = {key: tree[key.partition(".")[0]][key.partition(".")[2]] for key in FIXED_KEYS}
    return values | {"training prompts": num_train_prompts}


def refuse_other_run(state: DriverState, now: dict[str, str | int], checkpoint: Path) -> None:
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


async def resume_from(checkpoint: Path, buffer: GroupBuffer, learner: Learner) -> None:
    """Bring buffer and learner to where the checkpoint was made."""
    buffer.restore(read_driver_state(checkpoint).buffer)
    await learner.load(checkpoint / "learner")


def _flush(folder: Path) -> None:
    """Have the disk hold every file before the folder gets its name."""
    for path in folder.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
