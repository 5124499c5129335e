"""Check a run before anything of it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medrl.cluster.checkpoints import (
    Checkpoints,
    fixed_settings,
    read_driver_state,
    refuse_other_model,
    refuse_other_run,
)
from medrl.cluster.method import for_method, with_steps
from medrl.cluster.preflight import Checked, check_inputs, refuse_used_directory
from medrl.configs.schema import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run that may start: nothing of the user's input is wrong."""

    config: Config
    checked: Checked
    checkpoint: Path | None  # to go on from
    damaged: Sequence[str] = ()  # a sentence for each newer one that is not whole


def prepare(config: Config, *, resume: bool) -> Prepared:
    """Check everything there is to check before an engine starts. Raises `UserError`."""
    refuse_used_directory(config.run_dir, resume=resume)
    config = for_method(config)
    checked = check_inputs(config, config.model.path)
    config = with_steps(config, len(checked.train))
    checkpoint: Path | None = None
    damaged: Sequence[str] = ()
    if resume:
        checkpoint, damaged = Checkpoints(config.run_dir / "checkpoints", keep=1).newest_whole()
    if checkpoint:
        now = fixed_settings(config, len(checked.train))
        refuse_other_run(read_driver_state(checkpoint), now, checkpoint)
        refuse_other_model(checkpoint, config.model.path)
    return Prepared(config=config, checked=checked, checkpoint=checkpoint, damaged=damaged)
