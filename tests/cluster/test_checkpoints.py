"""A checkpoint is whole or not there, whenever its writer dies and whatever the disk does."""

from __future__ import annotations

import asyncio
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from builders import make_prompt
from made_checkpoints import SlowLearner, holds_one_step, in_process, save, state
from rich.console import Console

from medrl.actors.fake_engine import FakeWire
from medrl.actors.pool import EnginePool
from medrl.cluster.checkpoints import Checkpoints
from medrl.cluster.display import Display
from medrl.cluster.interrupt import Interrupt
from medrl.cluster.journal import Journal
from medrl.cluster.manifest import damage, seal
from medrl.cluster.preflight import Checked
from medrl.cluster.prepare import Prepared
from medrl.cluster.requests import requests_of
from medrl.cluster.run import Run
from medrl.configs.errors import CheckpointError, UserError
from medrl.configs.schema import Config, DataConfig, ModelConfig, RunConfig
from medrl.learner.fake_learner import FakeLearner
from medrl.reports.lines import read_lines

KILLS = 60


def saves_for_ever(folder: Path, first: int) -> Callable[[int], None]:
    def job(writing: int) -> None:
        for step in range(first, 256):
            save(folder, step, pause_s=0.001)
            os.write(writing, bytes([step]))

    return job


def test_whenever_its_writer_is_killed_what_is_there_is_whole(tmp_path: Path) -> None:
    """The old ones, or the old ones and the new one: never less, and never half of one."""
    rng = random.Random(0)
    folder, cut_off = tmp_path / "checkpoints", 0
    newest = 0
    for _ in range(KILLS):
        process, reading = in_process(saves_for_ever(folder, newest + 1))
        time.sleep(rng.uniform(0.0, 0.15))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        with os.fdopen(reading, "rb") as told:
            done = max([newest, *told.read()])
        there = sorted(folder.glob("step_*"), key=lambda path: int(path.name[5:]))
        assert all(not damage(path) and holds_one_step(path) for path in there)
        steps = [int(path.name[5:]) for path in there]
        assert not newest or steps[-1] in (done, done + 1)  # the last may not have told any more
        assert len(steps) >= min(2, done)
        newest = steps[-1] if steps else 0
        cut_off += bool(list(folder.glob(".step_*")))
        assert Checkpoints(folder, 2).newest_whole()[0] == (there[-1] if there else None)
    assert newest > 5
    assert cut_off > KILLS // 4  # else nothing was met in the middle
    save(folder, newest + 1)
    assert not list(folder.glob(".step_*"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("harm", "name", "said"),
    [
        (flip, "learner/model/model.safetensors", "has another SHA-256"),
        (cut, "learner/state/optimizer.bin", "has 65535 bytes of 65536"),
        (os.unlink, "learner/rng_0.bin", "is missing"),
        (flip, "driver.json", "has another SHA-256"),
        (os.unlink, "manifest.json", "has no manifest.json"),
        (cut, "manifest.json", "manifest.json cannot be read"),
    ],
)
def test_a_damaged_one_is_set_aside_for_the_one_before_and_it_is_said(
    tmp_path: Path, harm: Callable[[Path], None], name: str, said: str
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    harm(tmp_path / "step_2" / name)
    checkpoint, sentences = Checkpoints(tmp_path, 2).newest_whole()
    assert checkpoint == tmp_path / "step_1"
    (sentence,) = sentences
    assert said in sentence
    assert sentence.endswith(f"it is now {tmp_path / 'step_2.damaged'}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_2.damaged"]
    save(tmp_path, 2)  # the run comes by again, and the same happens again
    harm(tmp_path / "step_2" / name)
    Checkpoints(tmp_path, 2).newest_whole()
    assert (tmp_path / "step_2.damaged").is_dir()
    assert (tmp_path / "step_2.damaged1").is_dir()


def test_with_none_whole_the_run_is_refused_each_time(tmp_path: Path) -> None:
    """Never begun anew over what there is."""
    for step in (1, 2):
        flip(save(tmp_path, step) / "driver.json")
    for _ in range(2):
        with pytest.raises(UserError, match=r"no checkpoint in .* is whole") as caught:
            Checkpoints(tmp_path, 2).newest_whole()
        assert len(caught.value.problems) == 3
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_2"]


def test_no_checkpoint_at_all_is_no_mistake(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", 2).newest_whole() == (None, ())


def test_a_file_that_somebody_added_is_no_damage(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "learner" / "notes.txt").write_text("a good one")
    assert Checkpoints(tmp_path, 2).newest_whole() == (tmp_path / "step_1", [])


def test_damaged_ones_do_not_count_among_those_to_keep(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    cut(tmp_path / "step_2" / "driver.json")
    save(tmp_path, 4, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2", "step_3", "step_4"]


def test_one_of_the_same_step_is_not_deleted_for_the_new_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_1.replaced"]


def test_the_event_loop_lives_while_a_checkpoint_is_sealed(tmp_path: Path) -> None:
    async def longest_pause() -> float:
        (tmp_path / "large").mkdir()
        with (tmp_path / "large" / "file").open("wb") as file:
            file.truncate(1 << 28)  # 0.15 s of SHA-256 at the least
        sealing = asyncio.create_task(asyncio.to_thread(seal, tmp_path / "large"))
        longest = 0.0
        while not sealing.done():
            began = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - began)
        await sealing
        return longest

    began = time.monotonic()
    assert asyncio.run(longest_pause()) < 0.5 * (time.monotonic() - began)


SMALL_DISK = """
import sys
from pathlib import Path
from made_checkpoints import holds_one_step, save
from medrl.cluster.manifest import damage
from medrl.configs.errors import CheckpointError

folder = Path(sys.argv[1]) / "checkpoints"
save(folder, 1)
filler = folder.parent / "filler"
filler.write_bytes(bytes(int(sys.argv[2])))
try:
    save(folder, 2)
except CheckpointError as error:
    print(error)
assert [path.name for path in folder.iterdir()] == ["step_1"]
assert not damage(folder / "step_1") and holds_one_step(folder / "step_1")
filler.unlink()
save(folder, 2)
assert not damage(folder / "step_2")
"""


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"]).returncode != 0,
    reason="may not mount",
)
def test_a_full_disk_fails_the_save_and_leaves_the_older_ones(tmp_path: Path) -> None:
    """A real one, of 1 MiB; a checkpoint takes 200 KiB."""
    mounted = 'mount -t tmpfs -o size=1m tmpfs "$1" && exec "$2" -c "$3" "$1" 700000'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mounted, "-", tmp_path, sys.executable, SMALL_DISK],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "the checkpoint of step 2 could not be written" in done.stdout
    assert "No space left on device; if the disk of" in done.stdout


@pytest.mark.parametrize("limit", [0, 100, 20_000, 60_000])
def test_a_write_that_fails_anywhere_leaves_the_older_ones(tmp_path: Path, limit: int) -> None:
    """The system refuses to let any file grow beyond `limit` bytes."""
    save(tmp_path, 1)

    def job(writing: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            save(tmp_path, 2)
        except CheckpointError as error:
            os.write(writing, str(error).encode())  # a pipe has no size

    process, reading = in_process(job)
    with os.fdopen(reading) as told:
        assert "step 2 could not be written: [Errno 27] File too large" in told.read()
    process.join()
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    assert not damage(tmp_path / "step_1")


class FullDisk(FakeLearner):
    """Its disk is full after so many updates."""

    full: tuple[int, ...] = ()

    async def save(self, folder: Path) -> None:
        if self.updates in self.full:
            raise CheckpointError("learner rank 1: [Errno 28] No space left on device")
        await super().save(folder)


def supervised_run(folder: Path, full: tuple[int, ...]) -> tuple[Run, io.StringIO]:
    config = Config(
        run=RunConfig(name="full", dir=str(folder), steps=4, method="sft", checkpoint_every=1),
        model=ModelConfig(path="none"),
        data=DataConfig(train="none"),
    )
    prompts = tuple(make_prompt(f"p{i}") for i in range(64))
    checked = Checked(train=prompts, test=(), image_root=folder, max_images=1)
    prepared = Prepared(config=config, checked=checked, checkpoint=None)
    learner = FullDisk(FakeWire(), skill=0.5, learning_rate=0.1)
    learner.full = full
    parts = SimpleNamespace(learner=learner, pool=EnginePool(), scorer=SimpleNamespace())
    heard = io.StringIO()
    display = Display(name="full", steps=4, console=Console(file=heard, width=200))
    requests = requests_of(config, prompts)
    journal = Journal(config.run_dir)
    run = Run(prepared, requests, parts, journal, display, Interrupt())  # type: ignore[arg-type]
    return run, heard


async def test_a_full_disk_in_between_is_said_and_training_goes_on(tmp_path: Path) -> None:
    run, heard = supervised_run(tmp_path, full=(2, 3))
    await run.go(None)
    said = heard.getvalue()
    assert said.count("No space left on device; if the disk") == said.count("training goes on") == 2
    folder = tmp_path / "full"
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_1", "step_4"]


async def test_a_run_does_not_end_well_without_its_last_checkpoint(tmp_path: Path) -> None:
    run, _ = supervised_run(tmp_path, full=(4,))
    with pytest.raises(CheckpointError, match="step 4 could not be written"):
        await run.go(None)
    names = sorted(path.name for path in (tmp_path / "full" / "checkpoints").iterdir())
    assert names == ["step_2", "step_3"]


async def test_a_learner_that_dies_while_saving_leaves_the_older_ones(tmp_path: Path) -> None:
    class Dies(SlowLearner):
        async def save(self, folder: Path) -> None:
            (folder / "half").write_bytes(b"x")
            raise RuntimeError("died")

    checkpoints = Checkpoints(tmp_path, 2)
    await checkpoints.save(state(1), SlowLearner(1))
    with pytest.raises(RuntimeError):
        await checkpoints.save(state(2), Dies(2))
    assert checkpoints.steps() == [1]
    assert checkpoints.newest_whole()[0] == tmp_path / "step_1"
