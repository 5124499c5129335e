"""The run's numbers for others to watch: Weights & Biases, and Prometheus through Ray's metrics.

Neither may stop a run: W&B goes offline where it has no key or no network and never asks.
"""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge

from medrl.configs.schema import Config

Record = Mapping[str, Any]
WANDB_TIMEOUT_S = 20
log = logging.getLogger(__name__)


class Prometheus:
    """Every number of metrics.jsonl as a gauge `ray_medrl_<key>` with the tag `run`."""

    def __init__(self, run_name: str) -> None:
        self._tags = {"run": run_name}
        self._gauges: dict[str, Gauge] = {}

    def on_step(self, metrics: Record) -> None:
        self._set("", metrics)

    def on_eval(self, evaluation: Record) -> None:
        self._set("eval_", evaluation)

    def _set(self, prefix: str, numbers: Record) -> None:
        for key, value in numbers.items():
            if isinstance(value, (int, float)):
                name = f"medrl_{prefix}{key.replace('.', '_')}"
                if name not in self._gauges:
                    self._gauges[name] = Gauge(name, description=key, tag_keys=("run",))
                self._gauges[name].set(float(value), tags=self._tags)


class WeightsAndBiases:
    """Steps and evaluations as a W&B run, stored in the run directory where there is no network."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        import wandb  # slow to import, and most runs do without

        options: dict[str, Any] = {
            "project": config.run.wandb_project,
            "name": config.run.name,
            "id": config.run.name,
            "resume": "allow",
            "dir": str(run_dir),
            "config": config.model_dump(mode="json"),
            "settings": wandb.Settings(silent=True, init_timeout=WANDB_TIMEOUT_S, console="off"),
        }
        # An explicit WANDB_MODE wins; without a key W&B would ask for one.
        if "WANDB_MODE" not in os.environ and not _has_key():
            options["mode"] = "offline"
        try:
            self._run = wandb.init(**options)
        except Exception as error:  # whatever the network does, the run goes on
            log.warning("W&B: %s; going on offline", error)
            self._run = wandb.init(**options | {"mode": "offline"})

    def on_step(self, metrics: Record) -> None:
        self._run.log(dict(metrics), step=int(metrics["step"]))

    def on_eval(self, evaluation: Record) -> None:
        numbers = {f"eval.{k}": v for k, v in evaluation.items() if isinstance(v, (int, float))}
        # Without a commit the numbers join the next step's, so that W&B's step never goes back.
        self._run.log(numbers, commit=False)

    def close(self) -> None:
        self._run.finish()


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
