"""Nodes that arrive at and leave a run, on a real cluster of several nodes on this machine: engines
join, go, and make room; learner ranks come back; nothing is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table
from real_runs import finish, wait_for

from medrl.cluster.loopback import ray_on_loopback
from medrl.reports.lines import read_lines

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

NODE = {"object_store_memory": 80 * 2**20}
NOTICED_SOON = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}
GONE_WITHIN_S = 60.0
# The driver's own address is the one the nodes have.
DRIVER = """
import sys
from medrl.cluster.cli import main
from medrl.cluster.loopback import ray_on_loopback
with ray_on_loopback():
    sys.exit(main())
"""


class Nodes:
    """A cluster whose head has no room, and a run on it, seen from outside."""

    def __init__(self) -> None:
        self.others = set(psutil.Process().children(recursive=True))  # engines of other tests, say
        with ray_on_loopback():
            self.cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": 0,
                    "include_dashboard": False,
                    "_system_config": NOTICED_SOON,
                    **NODE,
                },
            )

    def arrives(self, cpus: int) -> Any:
        with ray_on_loopback():
            return self.cluster.add_node(num_cpus=cpus, **NODE)

    def leaves(self, node: Any, *, says_so: bool) -> None:
        self.cluster.remove_node(node, allow_graceful=says_so)

    def train(self, config: Path, folder: Path, *overrides: str) -> subprocess.Popen[str]:
        address = f"placement.address={self.cluster.address}"
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, "train", str(config), address, *overrides],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def groups_and_actors(self) -> tuple[list[str], list[str]]:
        """Placement groups that are not removed, and processes of actors."""
        with ray_on_loopback():
            ray.init(address=self.cluster.address, log_to_driver=False)
        try:
            states = [group["state"] for group in placement_group_table().values()]
        finally:
            ray.shutdown()
        family = set(psutil.Process().children(recursive=True)) - self.others
        titles = [" ".join(_command(one)) for one in family]
        parts = ("Actor", "VLLM::")
        running = [title for title in titles if any(part in title for part in parts)]
        return [state for state in states if state != "REMOVED"], running


def _command(one: psutil.Process) -> list[str]:
    try:
        return one.cmdline()
    except psutil.Error:
        return []


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    before = signal.getsignal(signal.SIGTERM)  # Ray sets its own
    started = Nodes()
    yield started
    started.cluster.shutdown()
    signal.signal(signal.SIGTERM, before)


def test_nodes_arrive_and_leave_and_the_run_goes_on(
    nodes: Nodes, folder: Path, config: Path
) -> None:
    """A rank and the one engine there must be are on the first node. A second brings an engine and
    takes it along; a third is not large enough for a second engine beside them, when the first is
    lost without a word."""
    run = folder / "runs" / "nodes"
    first = nodes.arrives(cpus=2)
    process = nodes.train(
        config,
        folder,
        *("run.name=nodes", "run.steps=100000", "run.checkpoint_every=1", "run.keep_checkpoints=2"),
        *("eval.every=0", "eval.max_prompts=8", "placement.engines=1..2", "placement.learners=1"),
        *("placement.cpus_per_process=1.0", "placement.sync_timeout_s=60"),
    )

    def until(condition: Callable[[], bool]) -> None:
        wait_for(condition, process)

    def steps() -> int:
        return len(read_lines(run / "metrics.jsonl"))

    def told(who: str, event: str) -> bool:
        faults = read_lines(run / "faults.jsonl")
        return (who, event) in [(it["who"], it["event"]) for it in faults]

    def go_on() -> None:
        before = steps()
        until(lambda: steps() >= before + 3)

    try:
        until(lambda: steps() >= 2)
        second = nodes.arrives(cpus=1)
        until(lambda: told("engine 1", "joined"))
        until(lambda: 1 in engines_of_last_step(run))
        assert read_lines(run / "syncs.jsonl")[-1]["engines"] in (1, 2)
        nodes.leaves(second, says_so=True)
        until(lambda: told("engine 1", "waiting"))
        go_on()
        assert engines_of_last_step(run) == {0}

        nodes.arrives(cpus=2)
        nodes.leaves(first, says_so=False)
        until(lambda: told("learner", "returned"))
        until(lambda: told("engine 0", "returned"))
        go_on()
        process.send_signal(signal.SIGINT)
        out = finish(process, status=130)
    finally:
        if process.poll() is None:
            process.kill()
    print(out)
    metrics, syncs = read_lines(run / "metrics.jsonl"), read_lines(run / "syncs.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1))
    versions = [receipt["version"] for receipt in syncs]
    assert versions == sorted(versions)
    assert {receipt["engines"] for receipt in syncs} == {1, 2}
    assert "engine 1 joins" in out
    assert "engine 1 waits for room: asked for 1 CPUs, the cluster has 0 free of 2" in out
    assert "is given up" not in out
    assert "without finishing a group" not in out
    deadline = time.monotonic() + GONE_WITHIN_S  # the cluster's, not the driver's: it does not wait
    while (left := nodes.groups_and_actors()) != ([], []) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == ([], [])


def engines_of_last_step(run: Path) -> set[int]:
    file = sorted((run / "completions").glob("*.parquet"))[-1]
    return set(pq.read_table(file, columns=["engine"]).column("engine").to_pylist())
