"""What a rank notes beside DeepSpeed's own checkpoint, and whether one fits this run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from medrl.actors.types import WeightMeta
from medrl.configs.errors import CheckpointError
from medrl.learner.settings import LearnerSettings

FILE = "learner.json"

_FIXED = (
    "family",
    "dtype",
    "ranks",
    "zero_stage",
    "freeze_vision",
    "lora_rank",
    "lora_alpha",
    "lora_vision",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerState:
    """What a checkpoint was made by. All but `version` must be the same to go on."""

    version: int  # updates so far
    family: str
    dtype: str
    ranks: int
    zero_stage: int
    freeze_vision: bool
    tensors: dict[str, list[int]]  # name -> full shape, adapters merged
    lora_rank: int = 0  # defaults: of checkpoints from before there were adapters
    lora_alpha: float = 32.0
    lora_vision: bool = False

    @classmethod
    def of(
        cls,
        settings: LearnerSettings,
        *,
        version: int,
        family: str,
        ranks: int,
        zero_stage: int,
        weights: Sequence[WeightMeta],
    ) -> LearnerState:
        model = settings.model
        return cls(
            version=version,
            family=family,
            dtype=settings.dtype,
            ranks=ranks,
            zero_stage=zero_stage,
            freeze_vision=model.freeze_vision,
            lora_rank=model.lora_rank,
            lora_alpha=model.lora_alpha,
            lora_vision=model.lora_vision,
            tensors={meta.name: list(meta.shape) for meta in weights},
        )

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
            for key in _FIXED
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
