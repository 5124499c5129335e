"""Numbers for others to watch never stop, delay or betray a run."""

import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from medrl.cluster import publish
from medrl.cluster.publish import Prometheus, WeightsAndBiases
from medrl.configs.loader import load_config
from medrl.configs.schema import Config

KEY = "0123456789abcdef0123456789abcdef01234567"


class FakeGauge:
    made: ClassVar[list["FakeGauge"]] = []

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.tag_keys, self.values = name, tag_keys, []
        FakeGauge.made.append(self)

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values.append((value, tags))


def test_every_number_is_a_gauge_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "Gauge", FakeGauge)
    monkeypatch.setattr(FakeGauge, "made", [])
    gauges = Prometheus("demo")
    gauges.on_step({"step": 1, "reward.mean": 0.5})
    gauges.on_step({"step": 2, "reward.mean": 0.75})
    gauges.on_eval({"step": 2, "accuracy": 0.9, "split": "test", "by_modality": {"CT": 0.9}})
    tags = {"run": "demo"}
    assert {gauge.name: gauge.values for gauge in FakeGauge.made} == {
        "medrl_step": [(1.0, tags), (2.0, tags)],
        "medrl_reward_mean": [(0.5, tags), (0.75, tags)],
        "medrl_eval_step": [(2.0, tags)],
        "medrl_eval_accuracy": [(0.9, tags)],
    }


@pytest.fixture
def config(tmp_path: Path, config_text: str, monkeypatch: pytest.MonkeyPatch) -> Config:
    path = tmp_path / "run.toml"
    path.write_text(config_text)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return load_config(path, ["run.wandb_project=lab"])


@pytest.fixture
def dead_server() -> Iterator[str]:
    """An address at which nothing listens."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{holder.getsockname()[1]}"


@pytest.mark.parametrize("key", ["", KEY])
def test_without_key_or_network_wandb_is_offline_at_once_and_keeps_the_key_to_itself(
    config: Config, tmp_path: Path, key: str, dead_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", dead_server)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    folder = tmp_path / "run"
    folder.mkdir()
    before = set(psutil.Process().children(recursive=True))
    began = time.monotonic()
    run = WeightsAndBiases(config, folder)
    run.on_step({"step": 1, "reward.mean": 0.5})
    run.on_eval({"step": 1, "accuracy": 0.9, "split": "test"})
    run.close()
    assert time.monotonic() - began < 10
    _, alive = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, 5)
    assert not alive
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in files)
    assert not [file for file in files if KEY.encode() in file.read_bytes()]


def test_a_server_that_fails_later_costs_its_numbers_not_the_run(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "online")
    ids: list[Any] = []

    class Broken:
        def log(self, *_: object, **__: object) -> None:
            raise ConnectionError("gone")

        def finish(self) -> None:
            raise ConnectionError("gone too")

    def init(**options: Any) -> Broken:
        ids.append(options.get("id"))
        if len(ids) == 1:
            raise wandb.errors.CommError("no such host")
        return Broken()

    monkeypatch.setattr(wandb, "init", init)
    with caplog.at_level(logging.WARNING):
        run = WeightsAndBiases(config, tmp_path)
        run.close()
        for number in (1, 2):
            run.on_step({"step": number})
        run.close()
    assert ids == ["test", None]  # the failed attempt still holds the id
    assert [r.getMessage() for r in caplog.records if "nothing more" in r.getMessage()] == [
        "W&B: gone; nothing more is sent to it"
    ]
