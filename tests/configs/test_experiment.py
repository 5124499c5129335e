"""An experiment file: what its runs share, what may differ, and what is refused."""

from pathlib import Path

import pytest

from medrl.configs.errors import UserError
from medrl.configs.experiment import flat, load_experiment, slug
from medrl.configs.loader import dump_config, load_config

ROOT = Path(__file__).parents[2]

BASE = """
[model]
path = "m"
[data]
train = "d"
test = "t"
[experiment]
name = "x"
sources = "modality"
seeds = [3, 4]
[[experiment.methods]]
name = "zero-shot"
train = "none"
[[experiment.methods]]
name = "SFT"
train = "sft"
[[experiment.methods]]
name = "GRPO think-before"
train = "grpo"
data.mode = "think-before"
rollout.max_tokens = 48
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.toml"
    path.write_text(BASE)
    return path


def test_each_method_is_trained_on_each_source_with_each_seed(file: Path) -> None:
    """The starting model has neither source nor seed, and comes first: engines start with it."""
    trainings = load_experiment(file).trainings(["CT", "X-ray"])
    assert [(t.method.train, t.source, t.seed) for t in trainings] == [
        ("none", "", 3),
        ("sft", "CT", 3),
        ("sft", "X-ray", 3),
        ("grpo", "CT", 3),
        ("grpo", "X-ray", 3),
        ("sft", "CT", 4),
        ("sft", "X-ray", 4),
        ("grpo", "CT", 4),
        ("grpo", "X-ray", 4),
    ]
    assert len({t.label for t in trainings}) == len(trainings)


def test_a_run_differs_from_the_others_in_method_source_and_seed_only(file: Path) -> None:
    trainings = {t.label: t.config for t in load_experiment(file).trainings(["CT"])}
    sft, grpo = trainings["sft-ct-s3"], trainings["grpo_think_before-ct-s3"]
    assert grpo.data.modalities == sft.data.modalities == ("CT",)
    one, other = (flat(c.model_dump(mode="json")) for c in (sft, grpo))
    assert {key for key in one if one[key] != other[key]} == {
        "run.name",
        "run.method",
        "data.mode",
        "rollout.max_tokens",
    }
    assert grpo.run_dir == Path("runs/x/runs/grpo_think_before-ct-s3")


def test_a_runs_config_reads_back(file: Path, tmp_path: Path) -> None:
    for training in load_experiment(file).trainings(["CT"]):
        path = tmp_path / "config.toml"
        path.write_text(dump_config(training.config))
        assert load_config(path) == training.config


def test_an_algorithm_is_as_whole_in_an_experiment_as_in_a_run(file: Path) -> None:
    """DAPO is also dynamic sampling and soft punishment, which lie outside section learner."""
    file.write_text(BASE + 'learner.algorithm = "dapo"')
    *others, dapo = load_experiment(file).configs.values()
    assert (dapo.rollout.max_replaced, dapo.reward.overlong_tokens) == (8, 9)
    assert {one.rollout.max_replaced for one in others} == {0}


def test_overrides_reach_runs_and_the_experiment(file: Path) -> None:
    loaded = load_experiment(file, ["run.steps=7", "experiment.seeds=[9]", 'run.dir="elsewhere"'])
    assert loaded.folder == Path("elsewhere/x")
    assert {t.config.run.steps for t in loaded.trainings([""])} == {7}
    assert {t.seed for t in loaded.trainings([""])} == {9}


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("data.max_pixels = 4096", "GRPO think-before: data.max_pixels = 4096, but zero-shot has"),
        ("placement.engines = 2", "GRPO think-before: placement.engines = 2, but zero-shot has 1"),
        ('data.test = "u"', "data.test = 'u', but zero-shot has 't'; only equal questions are"),
        ("eval.max_prompts = 9", "GRPO think-before: eval.max_prompts = 9, but zero-shot has 0"),
        ("rollout.completion = 4", "GRPO think-before: rollout.completion: unknown key; did you"),
        ("rollout.prompts = 7\nplacement.learners = 2", "GRPO think-before: rollout.prompts: got"),
        ('data.mod = "x"', "did you mean 'mode'"),
    ],
)
def test_a_methods_own_keys_are_checked_with_its_name(file: Path, extra: str, said: str) -> None:
    file.write_text(BASE + extra)
    with pytest.raises(UserError) as caught:
        load_experiment(file)
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('train = "sft"', 'train = "dpo"', "methods.1.train: got"),
        ('name = "SFT"', 'name = "Zero Shot"', "would share a folder"),
        ('name = "SFT"', 'name = "zero-shot"', "stands there twice"),
        ("seeds = [3, 4]", "seeds = [3, 3]", "experiment.seeds: got [3, 3], needs different ones"),
        ('sources = "modality"', 'sources = "organ"', "sources: got"),
        ('name = "x"', 'nam = "x"', "did you mean 'name'?"),
    ],
)
def test_a_wrong_experiment_section_is_refused(file: Path, old: str, new: str, said: str) -> None:
    file.write_text(BASE.replace(old, new))
    with pytest.raises(UserError) as caught:
        load_experiment(file)
    assert said in str(caught.value)


def test_a_runs_file_is_told_from_an_experiments(file: Path) -> None:
    file.write_text(BASE[: BASE.index("[experiment]")])
    with pytest.raises(UserError, match="use medrl train"):
        load_experiment(file)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/experiments").glob("*.toml")), ids=str)
def test_the_shipped_experiments_load(path: Path) -> None:
    loaded = load_experiment(path)
    assert loaded.settings.name == path.stem
    assert loaded.trainings(["CT"])


def test_a_slug_is_a_file_name() -> None:
    assert slug("GRPO think-before") == "grpo_think_before"
    assert slug("../../etc") == "etc"
    assert slug("Röntgen / X") == "r_ntgen_x"
    assert slug("//") == "x"
