"""The run's numbers for others to watch: Weights & Biases, and Prometheus through Ray's metrics.

Neither may stop a run: W&B goes offline where it has no key or no network and never asks.
"""

from __future__ import annotations

import logging
import netrc
import os
import socket
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray.util.metrics import Gauge

from medrl.configs.schema import Config

Record = Mapping[str, Any]
WANDB_TIMEOUT_S = 20  # of a server that answers slowly
CONNECT_TIMEOUT_S = 3.0  # of one that is not there
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
    """Steps and evaluations as a W&B run, stored in the run directory where there is no network.

    Whatever W&B does, nothing here raises: a warning, and the run goes on without it.
    """

    def __init__(self, config: Config, run_dir: Path) -> None:
        import wandb  # slow to import, and most runs do without

        settings = wandb.Settings(silent=True, init_timeout=WANDB_TIMEOUT_S, console="off")
        options: dict[str, Any] = {
            "project": config.run.wandb_project,
            "name": config.run.name,
            "dir": str(run_dir),
            "config": config.model_dump(mode="json"),
            "settings": settings,
        }
        online: dict[str, Any] = {"id": config.run.name, "resume": "allow"}
        # An explicit WANDB_MODE wins; without a key W&B would ask for one.
        if "WANDB_MODE" not in os.environ and not _reachable(settings.base_url):
            online["mode"] = "offline"
        self._run: Any = None
        # The second time under an id of its own: a failed start still holds the first.
        offline: dict[str, Any] = {"mode": "offline"}
        for more in (online, offline):
            try:
                self._run = wandb.init(**options, **more)
                return
            except Exception as error:
                log.warning("W&B (%s): %s", more.get("mode", "online"), error)

    def on_step(self, metrics: Record) -> None:
        self._log(metrics, step=int(metrics["step"]))

    def on_eval(self, evaluation: Record) -> None:
        numbers = {f"eval.{k}": v for k, v in evaluation.items() if isinstance(v, (int, float))}
        # Without a commit the numbers join the next step's, so that W&B's step never goes back.
        self._log(numbers, commit=False)

    def close(self) -> None:
        import wandb

        try:
            if self._run:
                self._run.finish()
            # Its process, too: at exit W&B would look for one that ended with the cluster.
            wandb.teardown()
        except Exception as error:
            log.warning("W&B: %s", error)

    def _log(self, numbers: Record, **options: Any) -> None:
        if self._run:
            try:
                self._run.log(dict(numbers), **options)
            except Exception as error:
                log.warning("W&B: %s; nothing more is sent to it", error)
                self._run = None


def _reachable(base_url: str) -> bool:
    """Whether there is a key for the server and something answers there, soon."""
    host = urlsplit(base_url).hostname or ""
    if not _has_key(host):
        return False
    if urllib.request.getproxies():
        return True  # then only W&B itself can tell
    try:
        port = urlsplit(base_url).port or 443
        socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()
    except OSError:
        log.warning("W&B: %s does not answer; the run is recorded offline", host)
        return False
    return True


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc().hosts
        return bool(hosts.keys() & {host, "api.wandb.ai", "default"})  # the second: W&B's former
    except (OSError, netrc.NetrcParseError):
        return False
