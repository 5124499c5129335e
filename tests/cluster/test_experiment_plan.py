"""What an experiment still has to do, decided before anything starts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
from pydantic import TypeAdapter

from medrl.actors.buffer import BufferState
from medrl.cluster.checkpoints import DriverState
from medrl.cluster.experiment import earlier_seconds, plan
from medrl.configs.errors import UserError
from medrl.configs.experiment import Experiment, load_experiment

METHODS = """
[experiment]
name = "x"
sources = "modality"
only = ["CT", "MRI"]
[[experiment.methods]]
name = "zero-shot"
train = "none"
[[experiment.methods]]
name = "SFT"
train = "sft"
[[experiment.methods]]
name = "GRPO"
train = "grpo"
"""


@pytest.fixture
def file(tmp_path: Path, config_text: str) -> Path:
    path = tmp_path / "x.toml"
    path.write_text(config_text + METHODS)
    return path


def labels(path: Path, *overrides: str) -> list[str]:
    planned = plan(load_experiment(path, overrides))
    return [training.label for training, _ in planned.todo]


def finish(experiment: Experiment, label: str) -> Path:
    """As if the run of this label were done."""
    folder = experiment.folder / "runs" / label
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"seconds": 1.0}))
    (experiment.folder / "experiment.toml").write_text(tomli_w.dumps(dict(experiment.tree)))
    return folder


def test_what_has_a_result_is_not_done_again(file: Path) -> None:
    everything = ["zero_shot-s0", "sft-ct-s0", "sft-mri-s0", "grpo-ct-s0", "grpo-mri-s0"]
    assert labels(file) == everything
    finish(load_experiment(file), "sft-ct-s0")
    assert labels(file) == [label for label in everything if label != "sft-ct-s0"]


def test_seeds_and_sources_may_join_a_begun_experiment(file: Path) -> None:
    finish(load_experiment(file), "sft-ct-s0")
    more = labels(file, "experiment.seeds=[0, 1]", 'experiment.only=["CT", "OCT"]')
    assert {"sft-oct-s0", "sft-ct-s1", "grpo-oct-s1"} <= set(more)
    assert "sft-ct-s0" not in more


def test_without_names_the_sources_are_those_of_the_training_data(file: Path) -> None:
    planned = plan(load_experiment(file, ["experiment.only=[]"]))
    sources = {training.source for training in planned.trainings} - {""}
    in_data = {prompt.modality for _, run in planned.todo for prompt in run.checked.train}
    assert sources == in_data
    assert len(sources) == 8


def test_a_run_trains_on_its_source_and_is_tested_on_everything(file: Path) -> None:
    todo = {training.label: run for training, run in plan(load_experiment(file)).todo}
    run = todo["grpo-mri-s0"]
    assert {prompt.modality for prompt in run.checked.train} == {"MRI"}
    everything = {run.checked.test for run in todo.values()}
    assert len(everything) == 1


def test_other_settings_than_those_of_the_finished_runs_are_refused(file: Path) -> None:
    finish(load_experiment(file), "sft-ct-s0")
    with pytest.raises(UserError) as caught:
        labels(file, "learner.learning_rate=5e-4", "placement.learners=1")
    assert len(caught.value.problems) == 3  # one a method; placement may change
    assert "SFT: learner.learning_rate" in str(caught.value)
    assert "was made with 0.001, now 0.0005" in str(caught.value)


def test_a_method_cannot_become_another_under_its_name(file: Path) -> None:
    """What it finished as the other would stand in its row."""
    finish(load_experiment(file), "sft-ct-s0")
    file.write_text(file.read_text().replace('train = "sft"', 'train = "grpo"'))
    with pytest.raises(UserError, match=r"SFT: train: .* was made with 'sft', now 'grpo'"):
        labels(file)


def test_engines_that_stay_up_have_one_folder_of_images(file: Path, tmp_path: Path) -> None:
    """Relative to another one, a path would name no image, or worse another one."""
    train = Path(load_experiment(file).any_config.data.train)
    other = tmp_path / "elsewhere" / "train"
    shutil.copytree(train, other)
    file.write_text(file.read_text() + f'data.train = "{other}"\n')
    with pytest.raises(UserError, match="images lie below different folders"):
        labels(file)


def test_a_source_that_is_not_in_the_data_is_refused_with_the_nearest(file: Path) -> None:
    with pytest.raises(UserError, match="no modality 'MRT' in the training data; did you mean"):
        labels(file, 'experiment.only=["CT", "MRT"]')


def test_a_run_that_broke_off_before_a_checkpoint_starts_anew(file: Path) -> None:
    folder = load_experiment(file).folder / "runs" / "grpo-ct-s0"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}\n")
    assert "grpo-ct-s0" in labels(file)
    assert not folder.exists()


def test_the_time_of_a_resumed_run_is_not_that_since_the_stop(file: Path) -> None:
    """Of the earlier steps, those that were not taken back count as they were measured."""
    run = plan(load_experiment(file)).todo[-1][1]
    assert earlier_seconds(run) == 0
    folder = run.config.run_dir / "checkpoints" / "step_2"
    folder.mkdir(parents=True)
    buffer = BufferState(version=2, next_draw=0, started={}, ready=())
    state = DriverState(step=2, fixed={}, buffer=buffer)
    (folder / "driver.json").write_bytes(TypeAdapter(DriverState).dump_json(state))
    steps = [{"step": step, "seconds.step": 10.0 * step} for step in (1, 2, 3)]
    (run.config.run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(s)}\n" for s in steps))
    assert earlier_seconds(replace(run, checkpoint=folder)) == 30


def test_a_method_that_cannot_be_trained_is_told_before_anything_starts(file: Path) -> None:
    """No data set has the reasoning that supervised fine-tuning in a think mode would imitate."""
    with pytest.raises(UserError, match=r"sft-ct-s0: data\.mode: got 'think-before'"):
        labels(file, 'data.mode="think-before"')
