"""What a rank notes beside DeepSpeed's own checkpoint, and whether one fits this run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from medrl.actors.types import WeightMeta
from medrl.configs.errors import CheckpointError

FILE = "learner.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerState:
    """What a checkpoint was made by. All but `version` must be the same to go on."""

    version: int  # updates so far
    family: str
    dtype: str
    ranks: int
    zero_stage: int
    freeze_vision: bool
    tensors: dict[str, list[int]]  # name -> full shape

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, folder: Path) -> LearnerState:
        try:
            return cls(**json.loads((folder / FILE).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"checkpoint {folder} is broken: {FILE}: {error}") from error

    def differences(self, saved: LearnerState) -> list[str]:
        """What keeps `saved` from fitting here, a clause each."""
        problems = [
            f"it has {key} = {getattr(saved, key)}, this run {getattr(self, key)}"
            for key in ("family", "dtype", "ranks", "zero_stage", "freeze_vision")
            if getattr(saved, key) != getattr(self, key)
        ]
        there, here = saved.tensors, self.tensors
        odd = [name for name in sorted(there | here) if there.get(name) != here.get(name)]
        if odd:
            problems.append(
                f"{len(odd)} tensor(s) differ, the first is {odd[0]}: "
                f"{there.get(odd[0], 'absent')} in it, {here.get(odd[0], 'absent')} here"
            )
        return problems


def shapes(weights: Sequence[WeightMeta]) -> dict[str, list[int]]:
    return {meta.name: list(meta.shape) for meta in weights}
