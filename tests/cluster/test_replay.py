"""`medrl replay` without engines: the schedule in a journal is all there is to repeat, and whatever
is not repeated is named."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_runs import Scorer, World

from medrl.actors.fake_engine import FakeEngine
from medrl.actors.types import Group, RolloutRequest, Score, ScoredGroup
from medrl.cluster import cli
from medrl.cluster.journal import COMPLETIONS
from medrl.cluster.recording import completions_of, read_recording, record_start
from medrl.cluster.replay import Replay, prepare_replay
from medrl.cluster.replay_buffer import ReplayBuffer, ReplayScorer
from medrl.cluster.replay_compare import Comparison, compare_step
from medrl.configs.errors import EngineError, UserError, as_death
from medrl.configs.loader import dump_config, load_config
from medrl.reports.lines import read_lines

STEPS = 8
Rows = list[dict[str, Any]]


def hasty(seed: int, dies_at: int = -1) -> type[FakeEngine]:
    """Engines that take any time; engine 1 is dead from draw `dies_at` on."""

    class Hasty(FakeEngine):
        rng = random.Random(seed)

        async def generate(self, request: RolloutRequest) -> Group:
            if self._index == 1 and 0 <= dies_at <= request.draw:
                raise as_death(EngineError("engine 1 died"))
            self._seconds = self.rng.choice((0.0, 0.0, 0.001, 0.004))
            return await super().generate(request)

    return Hasty


class Unlucky(Scorer):
    """Now and then a reward takes too long."""

    async def score_group(self, group: Group) -> ScoredGroup:
        scored = await super().score_group(group)
        if group.request.draw % 3:
            return scored
        late = Score(components={}, total=0.0, outcome="timeout", reason="2 s")
        return replace(scored, scores=(late, *scored.scores[1:]))


def recorded(folder: Path, **settings: Any) -> World:
    defaults: dict[str, Any] = {"kind": hasty(0), "delays": (0.0, 0.0), "skill": 0.6}
    return World(folder, steps=STEPS, **{**defaults, **settings})


def compared(then: Path, now: Path, step: int) -> Comparison:
    was, is_ = (read_lines(run / "metrics.jsonl")[step - 1] for run in (then, now))
    return compare_step(then, now, was, is_)


async def replayed(
    then: Path,
    now: Path,
    steps: int = 0,
    request: Callable[[int], RolloutRequest] | None = None,
) -> Sequence[Comparison]:
    """With one engine, at its own pace; up to the first difference."""
    schedule = read_recording(then, steps)
    world = World(now, steps=STEPS, skill=0.6, delays=(0.0,), kind=hasty(7))
    done: list[Comparison] = []
    buffer = ReplayBuffer(schedule)

    async def after_step(step: int) -> None:
        done.append(compared(then, now, step))
        if not done[-1].same:
            await buffer.stop()

    scorer = ReplayScorer(world.parts.scorer, schedule)
    world.parts = replace(world.parts, buffer=buffer, scorer=scorer, after_step=after_step)
    if request:
        world.parts = replace(world.parts, request=request)
    await world.run()
    assert world.learner.updates == len(done)
    return done


@pytest.mark.parametrize(
    ("staleness", "settings"),
    [
        (0, {}),
        (1, {}),
        (2, {"max_replaced": 2}),
        (2, {"kind": hasty(1, dies_at=9)}),
        (1, {"scorer": Unlucky()}),
    ],
    ids=["synchronous", "stale", "replaced", "an engine dies", "rewards out of time"],
)
async def test_a_run_is_repeated_to_the_last_bit(
    tmp_path: Path, staleness: int, settings: dict[str, Any]
) -> None:
    await recorded(tmp_path / "then", staleness=staleness, **settings).run()
    lines = read_lines(tmp_path / "then" / "metrics.jsonl")
    assert max(line["staleness.max"] for line in lines) == staleness
    done = await replayed(tmp_path / "then", tmp_path / "now")
    assert [step.step for step in done] == list(range(1, STEPS + 1))
    assert all(step.same and step.gradient_norm[0] == step.gradient_norm[1] for step in done)
    assert max(step.logprobs_apart for step in done) == 0
    if "max_replaced" in settings:
        assert sum(line["replaced_groups"] for line in lines) > 0
    if "scorer" in settings:
        assert sum(line["failed_completions"] for line in lines) > 0


async def test_the_schedule_is_what_repeats_it(tmp_path: Path) -> None:
    """So the test above can fail: left to timing, the same run becomes another."""
    for seed in (0, 1):
        await recorded(tmp_path / str(seed), staleness=2, kind=hasty(seed)).run()
    pairs = (compared(tmp_path / "0", tmp_path / "1", s) for s in range(1, STEPS + 1))
    assert not all(pair.same for pair in pairs)


async def test_a_resumed_run_is_repeated(tmp_path: Path) -> None:
    """What was in flight at the checkpoint was sampled again, from a later version."""
    first = recorded(tmp_path / "then", staleness=2)

    async def stop_at_3(step: int) -> None:
        if step == 3:
            await first.buffer.stop()

    first.parts = replace(first.parts, after_step=stop_at_3)
    await first.run()
    second = recorded(tmp_path / "then", staleness=2, kind=hasty(5))
    second.buffer.restore(first.buffer.state())
    second.learner.skill = first.learner.skill
    second.journal.rewind(3)
    await second.run()
    done = await replayed(tmp_path / "then", tmp_path / "now")
    assert len(done) == STEPS
    assert all(step.same for step in done)


async def test_the_first_steps_alone(tmp_path: Path) -> None:
    await recorded(tmp_path / "then", staleness=1).run()
    done = await replayed(tmp_path / "then", tmp_path / "now", steps=3)
    assert [step.step for step in done] == [1, 2, 3]
    with pytest.raises(UserError, match=f"--steps: got 9, but .* has {STEPS}"):
        read_recording(tmp_path / "then", 9)


def edit(run: Path, step: int, change: Callable[[Rows], object]) -> None:
    """Change the journal of a step behind its back."""
    path = completions_of(run, step)
    rows = pq.read_table(path).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=COMPLETIONS), path)


def swap_groups(rows: Rows) -> None:
    rows[:8] = [*rows[4:8], *rows[:4]]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: rows[6]["token_ids"].__setitem__(3, 9), "completion 2: token 3 was 9, is"),
        (lambda rows: rows[6]["token_ids"].append(1), r"completion 2: had \d+ tokens, has"),
        (lambda rows: rows[4].update(reward=3.0), "completion 0: reward was 3.0, is"),
        (lambda rows: rows[4].update(advantage=3.0), "completion 0: advantage was 3.0, is"),
        (lambda rows: rows[5].update(outcome="unheard"), "completion 1: outcome was unheard, is"),
        (lambda rows: rows[7].update(image_hashes=["x"]), r"image_hashes was \['x'\], is"),
    ],
    ids=["a token", "one more", "a reward", "an advantage", "an outcome", "an image"],
)
async def test_what_differs_is_named(
    tmp_path: Path, change: Callable[[Rows], object], told: str
) -> None:
    """The step, the draw, the completion, what was and what is; and there it ends."""
    await recorded(tmp_path / "then", staleness=1).run()
    draw = pq.read_table(completions_of(tmp_path / "then", 3)).to_pylist()[4]["draw"]
    edit(tmp_path / "then", 3, change)
    *same, differing = await replayed(tmp_path / "then", tmp_path / "now")
    assert [step.same for step in same] == [True, True]
    with pytest.raises(AssertionError, match=rf"step 3, draw {draw} \(prompt p\d\), .*{told}"):
        raise AssertionError(differing.difference)


async def test_a_loss_that_differs_is_named(tmp_path: Path) -> None:
    """At the size that counts: one millionth."""
    await recorded(tmp_path / "then").run()
    path = tmp_path / "then" / "metrics.jsonl"
    first, second, *others = path.read_text().splitlines()
    loss = read_lines(path)[1]["loss"]
    for far, same in ((0.9e-6, True), (1.1e-6, False)):
        second_now = second.replace(f'"loss": {loss!r}', f'"loss": {loss + far!r}')
        path.write_text("\n".join([first, second_now, *others]) + "\n")
        assert read_lines(path)[1]["loss"] == loss + far
        (*_, last) = await replayed(tmp_path / "then", tmp_path / f"now{same}", steps=2)
        assert last.same is same
    assert last.difference.startswith("step 2, loss was 1.1")


async def test_another_order_or_version_shows(tmp_path: Path) -> None:
    """The schedule is followed as it is written, and a wrong one leads elsewhere."""
    await recorded(tmp_path / "then", staleness=2).run()
    for name, change in (
        ("order", swap_groups),
        ("version", lambda rows: [row.update(version=0) for row in rows]),
    ):
        shutil.copytree(tmp_path / "then", tmp_path / name)
        edit(tmp_path / name, STEPS, change)
    assert (await replayed(tmp_path / "then", tmp_path / "now"))[-1].same
    *_, other = await replayed(tmp_path / "version", tmp_path / "version_now")
    assert (other.step, other.same) == (STEPS, False)
    assert "token" in other.difference
    # The learner's arithmetic may depend on the order; the one recorded is kept.
    (*_, step) = read_recording(tmp_path / "order")
    assert list(step.batch)[:2] == sorted(step.batch)[:2][::-1]
    (*_, swapped) = await replayed(tmp_path / "order", tmp_path / "order_now")
    assert swapped.same


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda run: edit(run, 2, lambda r: [x.update(version=7) for x in r]), "comes later"),
        (
            lambda run: edit(run, 2, lambda r: r[0].update(version=1 - r[0]["version"])),
            "more than one version",
        ),
        (lambda run: completions_of(run, 2).unlink(), "step_000002.parquet is missing"),
        (lambda run: completions_of(run, 2).write_text("x"), "is no file of completions"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "has no steps"),
        (lambda run: (run / "metrics.jsonl").unlink(), "has no steps"),
        (lambda run: shutil.copy(completions_of(run, 1), completions_of(run, 3)), "as well"),
    ],
)
async def test_a_schedule_that_cannot_be_is_refused(
    tmp_path: Path, change: Callable[[Path], object], told: str
) -> None:
    """Else the replay would wait for ever."""
    await recorded(tmp_path, staleness=1).run()
    change(tmp_path)
    with pytest.raises(UserError, match=told):
        read_recording(tmp_path)


@pytest.fixture
async def run(tmp_path: Path, config_text: str) -> Path:
    """A run directory whose config names a real model and data; its journal is of fakes' groups,
    with the prompts that the config's schedule says."""
    from medrl.cluster.prepare import prepare
    from medrl.cluster.requests import requests_of

    file = tmp_path / "in.toml"
    file.write_text(config_text)
    config = load_config(file, ["run.name=done"])
    prepared = prepare(config, resume=False)
    requests = requests_of(prepared.config, prepared.checked.train)
    world = recorded(config.run_dir)
    world.parts = replace(world.parts, request=requests.train)
    await world.run()
    (config.run_dir / "config.toml").write_text(dump_config(config))
    record_start(config.run_dir, config.model.path)
    return config.run_dir


def test_what_can_be_repeated_is_accepted(run: Path) -> None:
    replay = prepare_replay(run, steps=3, overrides=["placement.engines=1"])
    assert len(replay.steps) == 3
    assert replay.prepared.config.placement.engines == 1
    assert replay.prepared.config.run_dir == run.with_name("done-replay")
    assert not replay.prepared.config.run_dir.exists()
    assert any("without run.deterministic" in note for note in replay.notes)


def other_model(run: Path) -> list[str]:
    model = run.parent / "model"
    shutil.copytree(load_config(run / "config.toml").model.path, model)
    weights = next(model.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    return [f"model.path={model}"]


def other_data(run: Path) -> list[str]:
    path = load_config(run / "config.toml").data.train
    return [f"data.train={Path(path).with_name('test')}"]


def set_in_config(run: Path, *overrides: str) -> list[str]:
    path = run / "config.toml"
    path.write_text(dump_config(load_config(path, overrides)))
    return []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda run: (run / "config.toml").unlink(), "has no config.toml; name the directory"),
        (lambda run: (run / "metrics.jsonl").unlink(), "has no steps"),
        (lambda run: run.with_name("done-replay").mkdir(), "done-replay exists already"),
        (lambda run: set_in_config(run, "run.method=sft"), "is of supervised fine-tuning"),
        (lambda run: set_in_config(run, "model.path=/gone"), "model.path: /gone: no such folder"),
        (lambda run: set_in_config(run, 'reward.terms=[{use="gone.away:f"}]'), "gone.away"),
        (other_model, "model.safetensors has another SHA-256: the run started from another model"),
        (other_data, "the data is not what the run was trained on; put that back"),
        (lambda run: ["run.seed=3"], "run.seed: a replay cannot change it"),
        (lambda run: ["placement.learners=1"], "placement.learners: a replay cannot change it"),
    ],
)
def test_what_cannot_be_repeated_is_refused_before_anything_starts(
    run: Path,
    change: Callable[[Path], list[str] | None],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = change(run)
    extra = overrides if isinstance(overrides, list) else []
    monkeypatch.setattr("sys.argv", ["medrl", "replay", str(run), *extra])
    before = set(run.parent.iterdir())
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr().err
    assert end.value.code == 2
    assert told in printed
    assert "Traceback" not in printed
    assert set(run.parent.iterdir()) == before
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


@pytest.mark.parametrize(
    ("loss", "status", "told"),
    [(0.0, 0, "the same: 3 steps"), (1.0, 1, "not the same: step 2, loss was 1.0, is")],
)
def test_the_exit_status_says_whether_it_is_the_same(
    run: Path,
    loss: float,
    status: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command itself, with fakes for engines and learner."""

    async def of_fakes(replay: Replay, say: object, on_step: Callable[[Comparison], None]) -> None:
        folder = replay.prepared.config.run_dir
        for step in await replayed(run, folder, len(replay.steps), replay.requests.train):
            on_step(step)

    path = run / "metrics.jsonl"
    first, second, *others = path.read_text().splitlines()
    line = json.loads(second)
    path.write_text("\n".join([first, json.dumps(line | {"loss": line["loss"] + loss}), *others]))
    monkeypatch.setattr("medrl.cluster.replay.run_replay", of_fakes)
    monkeypatch.setattr("sys.argv", ["medrl", "replay", str(run), "--steps", "3"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == status
    assert told in " ".join(capsys.readouterr().out.split())
