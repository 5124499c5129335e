"""A learner that dies under a whole run comes back in the same job, from the last checkpoint."""

from __future__ import annotations

import asyncio
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_runs import PROMPTS, World, draws_trained
from rich.console import Console

from medrl.actors.fake_engine import FakeWire
from medrl.actors.pool import MAX_DEATHS
from medrl.actors.types import Example, Group, ImitationMetrics, ScoredGroup, Sent, UpdateMetrics
from medrl.cluster.checkpoints import Checkpoints
from medrl.cluster.display import Display
from medrl.cluster.interrupt import Interrupt, Interrupted
from medrl.cluster.journal import Journal
from medrl.cluster.preflight import Checked
from medrl.cluster.prepare import Prepared
from medrl.cluster.run import Run
from medrl.configs.errors import EngineError, LearnerError, as_death
from medrl.configs.schema import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
)
from medrl.learner.fake_learner import FakeLearner
from medrl.reports.lines import read_lines

STEPS = 12
EVERY = 4  # steps between checkpoints


class FrailLearner(FakeLearner):
    """Dies in the calls it is told to, "update 6" being the sixth since the run began; dead, it
    answers nothing but `restart`."""

    def __init__(self, wire: FakeWire, dies_in: Sequence[str] = ()) -> None:
        super().__init__(wire, skill=0.3, learning_rate=0.1)
        self._dies_in = dies_in
        self._calls: Counter[str] = Counter()
        self._dead = False
        self.restarts = 0

    def _called(self, method: str) -> None:
        self._calls[method] += 1
        self._dead = self._dead or f"{method} {self._calls[method]}" in self._dies_in
        if self._dead:
            self._wire.hang_up()
            raise as_death(LearnerError(f"learner rank 1 died ({method} {self._calls[method]})"))

    async def restart(self) -> None:
        self._dead = False
        self.restarts += 1
        await super().restart()
        self._called("restart")

    async def update(self, batch: Sequence[ScoredGroup]) -> UpdateMetrics:
        self._called("update")
        return await super().update(batch)

    async def imitate(self, batch: Sequence[Example]) -> ImitationMetrics:
        self._called("imitate")
        return await super().imitate(batch)

    async def logprobs(self, group: Group) -> tuple[tuple[float, ...], ...]:
        self._called("logprobs")
        return await super().logprobs(group)

    async def send(self) -> Sent:
        self._called("send")
        return await super().send()

    async def save(self, folder: Path) -> None:
        self._called("save")
        await super().save(folder)

    async def load(self, folder: Path) -> None:
        self._called("load")
        await super().load(folder)

    async def export(self, folder: Path) -> None:
        self._called("export")
        await super().export(folder)


class WholeRun:
    """`cluster.run` over fakes, checkpoints and export included."""

    def __init__(
        self,
        folder: Path,
        dies_in: Sequence[str] = (),
        *,
        staleness: int = 0,
        kind: type[FrailLearner] = FrailLearner,
        method: str = "grpo",
        evaluates: int = 0,
        checkpoint: Path | None = None,
    ) -> None:
        """`evaluates`: every so many steps. `checkpoint`: of a driver that was killed."""
        world = World(folder / "unused", steps=STEPS, staleness=staleness)
        self.pool = world.pool
        self.learner = kind(world.wire, dies_in)
        world.sync._learner = self.learner
        config = Config(
            run=RunConfig(
                name="run",
                dir=str(folder),
                steps=STEPS,
                checkpoint_every=EVERY,
                method=method,  # type: ignore[arg-type]
            ),
            model=ModelConfig(path="none"),
            data=DataConfig(train="none"),
            rollout=RolloutConfig(prompts=4, completions=4, max_tokens=32, staleness=staleness),
            eval=EvalConfig(every=evaluates),
        )
        self.folder = config.run_dir
        test = tuple(PROMPTS[:4]) if evaluates else ()
        checked = Checked(train=tuple(PROMPTS), test=test, image_root=folder, max_images=1)
        self.heard = io.StringIO()
        self.interrupt = Interrupt()
        parts = SimpleNamespace(
            learner=self.learner,
            pool=world.pool,
            sampler=world.parts.sampler,
            scorer=world.parts.scorer,
            sync=world.sync,
        )
        self.run = Run(
            Prepared(config=config, checked=checked, checkpoint=checkpoint),
            world.requests,
            parts,  # type: ignore[arg-type]
            Journal(self.folder),
            Display(name="run", steps=STEPS, console=Console(file=self.heard, width=200)),
            self.interrupt,
        )

    def lines(self, name: str) -> list[dict[str, object]]:
        return read_lines(self.folder / f"{name}.jsonl")


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize(
    "death", ["update 1", "update 7", "send 1", "send 7", "logprobs 7", "save 2", "export 1"]
)
async def test_wherever_the_learner_dies_the_run_is_whole(
    tmp_path: Path, death: str, staleness: int
) -> None:
    whole = WholeRun(tmp_path, [death], staleness=staleness)
    await whole.run.go(None)
    assert [line["step"] for line in whole.lines("metrics")] == list(range(1, STEPS + 1))
    versions = [line["version"] for line in whole.lines("syncs")]
    assert versions == sorted(versions)  # type: ignore[type-var]
    assert set(versions) == set(range(STEPS + 1))
    assert draws_trained(whole.folder) == list(range(4 * STEPS))
    assert (whole.folder / "export" / "fake.json").exists()
    assert whole.learner.restarts == 1
    assert [line["event"] for line in whole.lines("faults")] == ["left", "returned"]
    assert whole.learner._calls["update"] <= STEPS + EVERY + 1  # what is done again
    assert "learner is started again: learner rank 1 died" in whole.heard.getvalue()
    if not staleness:
        calm = WholeRun(tmp_path / "calm")
        await calm.run.go(None)
        assert whole.learner.skill == calm.learner.skill


async def test_supervised_fine_tuning_goes_on_as_well(tmp_path: Path) -> None:
    whole = WholeRun(tmp_path, ["imitate 7", "imitate 9"], method="sft")
    await whole.run.go(None)
    assert [line["step"] for line in whole.lines("metrics")] == list(range(1, STEPS + 1))
    assert whole.learner.restarts == 2
    assert whole.learner._calls["imitate"] == STEPS + 5  # from 4: 5, 6, died; 5, died; and on


async def test_a_learner_that_dies_while_it_comes_back_is_brought_back_again(
    tmp_path: Path,
) -> None:
    whole = WholeRun(tmp_path, ["update 7", "restart 1", "load 1"])
    await whole.run.go(None)
    assert whole.learner.restarts == 3
    assert draws_trained(whole.folder) == list(range(4 * STEPS))


async def test_a_crash_loop_ends_with_the_first_cause_on_top(tmp_path: Path) -> None:
    class Loop(FrailLearner):
        async def update(self, batch: Sequence[ScoredGroup]) -> UpdateMetrics:
            if self.updates == 6:
                self._dies_in = [f"update {self._calls['update'] + 1}"]
            return await super().update(batch)

    whole = WholeRun(tmp_path, kind=Loop)
    with pytest.raises(LearnerError) as caught:
        await whole.run.go(None)
    first, second = str(caught.value).split("\n")
    assert first == "learner rank 1 died (update 7)"
    assert second.startswith("the learner died 4 times without getting past step 6;")
    assert whole.learner.restarts == MAX_DEATHS - 1
    checkpoint, _ = Checkpoints(whole.folder / "checkpoints", 2).newest_whole()
    assert checkpoint is not None
    assert checkpoint.name == "step_6"  # between two multiples of EVERY: the best there is


async def test_what_a_ranks_own_code_raises_twice_ends_the_run_with_a_checkpoint_before_it(
    tmp_path: Path,
) -> None:
    """Memory that ends on one batch ends on it again: nothing is gained by two more tries."""

    class Full(FrailLearner):
        async def update(self, batch: Sequence[ScoredGroup]) -> UpdateMetrics:
            if self.updates == 6:
                self._calls["full"] += 1
                told = LearnerError(
                    f"out of memory; lower it\nrank {self._calls['full'] % 2}: 2 GiB"
                )
                told.certain = True
                raise as_death(told)
            return await super().update(batch)

    whole = WholeRun(tmp_path, kind=Full)
    with pytest.raises(LearnerError, match="the same twice at step 7") as caught:
        await whole.run.go(None)
    assert str(caught.value).startswith("out of memory; lower it\n")
    assert whole.learner.restarts == 1
    assert Checkpoints(whole.folder / "checkpoints", 2).steps() == [4, 6]


async def test_what_a_rank_raises_once_is_done_again(tmp_path: Path) -> None:
    class Once(FrailLearner):
        async def update(self, batch: Sequence[ScoredGroup]) -> UpdateMetrics:
            if self.updates in (3, 6) and not self._calls[f"at {self.updates}"]:
                self._calls[f"at {self.updates}"] += 1
                told = LearnerError("learner rank 0 failed (update): KeyError: 'x'")
                told.certain = True
                raise as_death(told)
            return await super().update(batch)

    whole = WholeRun(tmp_path, kind=Once)
    await whole.run.go(None)
    assert whole.learner.restarts == 2
    assert draws_trained(whole.folder) == list(range(4 * STEPS))


async def test_weights_of_half_a_batch_are_in_no_checkpoint(tmp_path: Path) -> None:
    class Half(FrailLearner):
        async def update(self, batch: Sequence[ScoredGroup]) -> UpdateMetrics:
            if self.updates == 6:
                told = LearnerError("step 7: the loss is nan")
                told.half_way = True
                raise told
            return await super().update(batch)

    whole = WholeRun(tmp_path, kind=Half)
    with pytest.raises(LearnerError, match="the loss is nan"):
        await whole.run.go(None)
    assert Checkpoints(whole.folder / "checkpoints", 2).steps() == [4]


async def test_deaths_with_steps_in_between_are_no_crash_loop(tmp_path: Path) -> None:
    deaths = [f"update {n}" for n in (2, 5, 8, 11, 13, 16)]  # each a step after the one before
    whole = WholeRun(tmp_path, deaths)
    await whole.run.go(None)
    assert whole.learner.restarts == len(deaths) > MAX_DEATHS
    assert draws_trained(whole.folder) == list(range(4 * STEPS))


async def test_a_refusal_is_no_death_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    """The batch would be refused again. The weights are those of the step before, and sound."""

    class Refusing(FrailLearner):
        async def update(self, batch: Sequence[ScoredGroup]) -> UpdateMetrics:
            if self.updates == 6:
                raise LearnerError("step 7: the loss is nan")
            return await super().update(batch)

    whole = WholeRun(tmp_path, kind=Refusing)
    with pytest.raises(LearnerError, match="the loss is nan"):
        await whole.run.go(None)
    assert whole.learner.restarts == 0
    checkpoint, _ = Checkpoints(whole.folder / "checkpoints", 2).newest_whole()
    assert checkpoint is not None
    assert checkpoint.name == "step_6"


async def test_a_stop_while_the_learner_comes_back_is_a_stop(tmp_path: Path) -> None:
    class Slow(FrailLearner):
        async def restart(self) -> None:
            interrupt._on_signal()
            await super().restart()

    whole = WholeRun(tmp_path, ["update 7"], kind=Slow)
    interrupt = whole.interrupt
    interrupt.on_request(whole.run.stop)
    with pytest.raises(Interrupted):
        await whole.run.go(None)
    assert Checkpoints(whole.folder / "checkpoints", 2).steps() == [4]


async def test_a_stop_while_no_engine_is_left_is_a_stop(tmp_path: Path) -> None:
    """It does not wait for one to come back; the update made is in the checkpoint."""
    whole = WholeRun(tmp_path)
    whole.interrupt.on_request(whole.run.stop)
    update = whole.learner.update

    async def last(batch: Sequence[ScoredGroup]) -> UpdateMetrics:
        if whole.learner.updates == 5:
            for index, engine in whole.pool.up.items():
                whole.pool.fail(index, engine, EngineError("gone"))
            asyncio.get_running_loop().call_later(0.05, whole.interrupt._on_signal)
        return await update(batch)

    whole.learner.update = last  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        async with asyncio.timeout(10):
            await whole.run.go(None)
    assert Checkpoints(whole.folder / "checkpoints", 2).steps() == [4, 6]


async def test_a_resumed_run_makes_the_evaluation_that_it_owes(tmp_path: Path) -> None:
    """Its driver was killed between a step's checkpoint and that step's evaluation."""

    class Killed(BaseException):
        pass

    whole = WholeRun(tmp_path, evaluates=EVERY)
    evaluate = whole.run._evaluate

    async def kill(step: int) -> None:
        if step == 8:
            raise Killed
        await evaluate(step)

    whole.run._evaluate = kill  # type: ignore[method-assign]
    with pytest.raises(Killed):
        await whole.run.go(None)
    assert [line["step"] for line in whole.lines("evals")] == [0, 4]
    checkpoint, _ = Checkpoints(whole.folder / "checkpoints", 2).newest_whole()
    again = WholeRun(tmp_path, evaluates=EVERY, checkpoint=checkpoint)
    await again.run.go(None)
    assert [line["step"] for line in again.lines("evals")] == [0, 4, 8, 12]
    assert [line["step"] for line in again.lines("metrics")] == list(range(1, STEPS + 1))
