"""Rewards that hang, crash, eat memory, shout and fork in a real run cost their own completions;
the actor that holds them comes back; a reward that fails too often stops the run, by its name."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from real_runs import ROOT, finish, lives, medrl, wait_for

from medrl.reports.lines import read_lines

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

REWARD = """
import json
from pathlib import Path

from hostile_rewards import behave

ORDERS = Path(__file__).parent / "orders"


def obey(completion, prompt):
    '''Do once what the one order says; fail always while there is a file `broken`.'''
    if (ORDERS / "broken").exists():
        raise LookupError("the lesion server is down")
    for order in ORDERS.glob("*.order"):
        try:
            order.rename(order.with_suffix(".taken"))
        except FileNotFoundError:
            continue  # the other process of the pool has it
        order.with_suffix(".json").write_text(json.dumps([prompt.id, completion]))
        behave(order.stem, prompt)
        order.with_suffix(".returned").touch()
    return 0.0
"""
HARMFUL = ("regex", "hang", "fork_and_hang", "exit", "segfault", "memory", "fork_and_die", "raise")
HARMLESS = ("print", "fork_and_return", "leave_children")
STEPS = 40
PROCESSES = 2


class HostileRun:
    """A run whose reward does what it is ordered to."""

    def __init__(self, config: Path, folder: Path) -> None:
        (folder / "hospital.py").write_text(REWARD)
        self.orders = folder / "orders"
        self.orders.mkdir()
        self.folder = folder / "runs" / "hostile"
        terms = "reward.terms=[{use='format'},{use='accuracy'},{use='hospital:obey'}]"
        sizes = ("placement.engines=1", "placement.learners=1", "eval.every=0", "data.test=''")
        self._arguments = ("train", config, "run.name=hostile", f"run.steps={STEPS}", terms, *sizes)
        self._cwd = folder
        self._seen: set[psutil.Process] = set()
        self.start()

    def start(self, *more: str) -> None:
        self.process = medrl(
            *self._arguments,
            *("reward.timeout_s=2.0", f"reward.processes={PROCESSES}", *more),
            cwd=self._cwd,
            PYTHONPATH=str(ROOT / "tests" / "rewards"),
        )

    def steps(self) -> int:
        return len(read_lines(self.folder / "metrics.jsonl"))

    def wait_for_steps(self, count: int) -> None:
        wait_for(lambda: self.steps() >= count, self.process)

    def order(self, action: str) -> None:
        """Have it done by one completion, and the step trained that this one is of."""
        (self.orders / f"{action}.order").touch()
        wait_for(lambda: (self.orders / f"{action}.json").exists(), self.process)
        self.processes("")
        self.wait_for_steps(self.steps() + 1)

    def processes(self, title: str) -> list[psutil.Process]:
        """Of the run, now, by what stands in their command line."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self._seen.update(family)
        return [one for one in family if title in _title(one)]

    def left_over(self) -> list[psutil.Process]:
        return [one for one in self._seen if lives(one)]

    def failed(self) -> list[tuple[str, str]]:
        """Prompt id and text of each completion of the journal that could not be scored."""
        tables = map(pq.read_table, sorted((self.folder / "completions").glob("*.parquet")))
        rows = [row for table in tables for row in table.to_pylist()]
        bad = [row for row in rows if row["outcome"] in ("error", "timeout")]
        assert all(row["reason"].startswith("obey: ") for row in bad)
        return sorted((row["prompt_id"], row["completion"]) for row in bad)

    def end(self) -> None:
        """Whatever the test found."""
        if self.process.poll() is None:
            for one in [*self.processes(""), self.process]:
                one.kill()


def _title(one: psutil.Process) -> str:
    try:
        return " ".join(one.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture
def run(config: Path, folder: Path) -> Iterator[HostileRun]:
    run = HostileRun(config, folder)
    yield run
    run.end()


def test_what_a_reward_does_costs_its_completions_and_too_much_of_it_stops_the_run(
    run: HostileRun,
) -> None:
    """Each kind once; then the actor is killed; then all completions fail; then, mended, it goes on
    with --resume and does all its steps."""
    began = time.monotonic()
    run.wait_for_steps(1)
    for action in (*HARMFUL, *HARMLESS):
        run.order(action)
    orders = [path.stem for path in run.orders.glob("*.json")]
    assert set(orders) == {*HARMFUL, *HARMLESS}
    returned = {path.stem for path in run.orders.glob("*.returned")}
    assert not returned & set(HARMFUL)
    hit = [json.loads((run.orders / f"{a}.json").read_text()) for a in {*orders} - returned]
    assert run.failed() == sorted(map(tuple, hit))
    wait_for(lambda: len(run.processes("medrl.rewards.worker")) == PROCESSES, run.process)

    (actor,) = run.processes("ray::RewardActor")
    actor.kill()
    wait_for(lambda: len(read_lines(run.folder / "faults.jsonl")) == 2, run.process)
    left, back = read_lines(run.folder / "faults.jsonl")
    assert [(it["who"], it["event"]) for it in (left, back)] == [
        ("rewards", "left"),
        ("rewards", "returned"),
    ]
    assert "the reward actor died" in left["cause"]
    wait_for(lambda: len(run.processes("medrl.rewards.worker")) == PROCESSES, run.process)

    (run.orders / "broken").touch()
    out, err = run.process.communicate(timeout=300)
    assert run.process.returncode == 1, f"{out[-3000:]}\n{err[-3000:]}"
    for text in (
        "above the limit of 10% (reward.max_failed_fraction): obey failed ",
        "': error, obey: LookupError: the lesion server is down",
    ):
        assert text in err, err
    assert err.count("\n  prompt ") == 3
    reached = run.steps()
    assert (run.folder / "checkpoints" / f"step_{reached}").is_dir()
    assert not run.left_over()

    (run.orders / "broken").unlink()
    run.start("--resume")
    run.processes("")
    finish(run.process)
    lines = read_lines(run.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert run.failed() == sorted(map(tuple, hit))
    assert not run.left_over()
    print(f"{time.monotonic() - began:.0f} s, stopped at step {reached}")
