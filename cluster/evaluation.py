"""`medrl eval`: the held-out numbers of a checkpoint, through engines that serve it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from medrl.cluster.engines import make_sampler, serving_engines
from medrl.cluster.evaluate import Evaluation, full_evaluation, write
from medrl.cluster.interrupt import Interrupt
from medrl.cluster.placement import cluster, placed
from medrl.cluster.preflight import Checked, check_inputs
from medrl.cluster.requests import requests_of
from medrl.configs.errors import UserError
from medrl.configs.schema import Config


def run_evaluation(
    config: Config, checkpoint: Path, out: Path | None
) -> tuple[dict[str, Any], Path]:
    """The held-out numbers of a checkpoint, an export or any model folder, and the file they were
    written to: `out`, else RUN/evals/NAME.json. Raises `UserError`."""
    if not checkpoint.exists():
        raise UserError(f"--checkpoint: {checkpoint} does not exist")
    inside = checkpoint / "learner" / "model"
    model = str(inside if inside.exists() else checkpoint)
    out = out or config.run_dir / "evals" / f"{checkpoint.resolve().name}.json"
    checked = check_inputs(config, model, evaluation_only=True)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir: {out.parent} cannot be made: {error.strerror}") from None
    evaluation = asyncio.run(_evaluate_model(config, checked, model))
    about = {
        "checkpoint": model,
        "mode": config.data.mode,
        "test": config.data.test,
        "max_prompts": config.eval.max_prompts,
        "notes": list(checked.notes),
    }
    return write(evaluation, out, **about), out


async def _evaluate_model(config: Config, checked: Checked, model: str) -> Evaluation:
    interrupt = Interrupt()
    with cluster(config.placement), interrupt.listening():
        async with (
            placed(config) as placement,
            serving_engines(config, checked, placement, model, interrupt) as pool,
        ):
            return await full_evaluation(
                checked.test,
                requests_of(config, checked.test),
                make_sampler(config, pool),
                image_root=checked.image_root,
                blind=config.eval.blind,
                interrupt=interrupt,
            )
