"""A config is right as a whole, or all its problems are told at once."""

import math
from pathlib import Path

import pytest
from pydantic import BaseModel

from medrl.configs.errors import UserError
from medrl.configs.loader import dump_config, load_config
from medrl.configs.schema import Config

GOOD = """
[run]
name = "x"
[model]
path = "some/model"
[data]
train = "train"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def problems(tmp_path: Path, text: str = GOOD, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, text), overrides)
    return str(caught.value)


def test_what_is_dumped_loads_as_the_same_config(tmp_path: Path) -> None:
    options = "{tolerance = 0.5, of = [1, 'x']}"
    overrides = ["learner.learning_rate=2e-6", "data.modalities=['CT', 'MRI']"]
    overrides += [f"reward.terms=[{{use='format'}}, {{use='numeric', options={options}}}]"]
    overrides += ["reward.policy=graded"]
    config = load_config(write(tmp_path, GOOD), overrides)
    assert load_config(write(tmp_path, dump_config(config))) == config
    assert config.reward.terms[1].options == {"tolerance": 0.5, "of": [1, "x"]}
    assert config.learner.learning_rate == 2e-6
    assert config.data.modalities == ("CT", "MRI")


def test_an_override_that_is_no_toml_is_a_string(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD), ["model.path=a/b-c", "run.steps=3"])
    assert (config.model.path, config.run.steps) == ("a/b-c", 3)


def test_every_problem_is_told_in_one_go_with_its_path(tmp_path: Path) -> None:
    text = GOOD.replace('path = "some/model"', "") + (
        "[rollout]\ncompletions = 1\ntemperature = nan\nprompts = '8'\n[lerner]\nx = 1\n"
    )
    told = problems(tmp_path, text, "learner.learning_rat=1", "learner.zero_stage=9").splitlines()
    assert len(told) == 7
    for start in (
        "model.path: this key is needed",
        "rollout.completions: got 1, needs",
        "rollout.temperature: got nan",
        'rollout.prompts: got "8", needs',
        "lerner: unknown key; did you mean 'learner'?",
        "learner.learning_rat: unknown key; did you mean 'learning_rate'?",
        "learner.zero_stage: got 9, needs",
    ):
        assert sum(line.startswith(start) for line in told) == 1, (start, told)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_no_number_may_be_infinite_or_nan(tmp_path: Path, value: str) -> None:
    for key in ("learner.learning_rate", "rollout.temperature", "reward.timeout_s"):
        assert key in problems(tmp_path, GOOD, f"{key}={value}")


def test_a_list_of_sections_says_which_item_is_wrong(tmp_path: Path) -> None:
    text = GOOD + "[[reward.terms]]\nuse = 'format'\n[[reward.terms]]\nuse = 'accuracy'\nwait = 2\n"
    assert problems(tmp_path, text) == "reward.terms.1.wait: unknown key; did you mean 'weight'?"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rollout.prompts=6", "needs a multiple of 4 (placement.learners 2 x"),
        ("rollout.max_tokens=4096", "needs less than rollout.max_model_len"),
        ("rollout.staleness=1", "learner.importance_cap"),
        ("run.deterministic=true", ""),
        ("run.deterministic=true rollout.staleness=1 learner.importance_cap=2.0", ""),
        ("placement.transport='ipc'", "needs placement.colocate"),
        ("placement.device='cpu'", ""),
        ("eval.every=5", "set data.test"),
        ("model.lora_vision=true", "model.lora_vision: true with model.lora_rank 0"),
        (
            "model.lora_vision=true model.lora_rank=8 model.freeze_vision=true",
            "model.lora_vision: true with model.freeze_vision",
        ),
        ("model.lora_vision=true model.lora_rank=8", ""),
        ("model.freeze_vision=true model.lora_rank=8", ""),
        ("model.lora_alpha=8", ""),
        ("reward.policy=medr1 data.mode=think-after", "the released code has no form for it"),
        ("reward.policy=medr1 data.mode=think-before", ""),
        ("data.mode=no-thnik", "data.mode: got \"no-thnik\", needs 'think-before'"),
        ("data.mode=my_lab.modes:DESCRIBE", ""),
        ("reward.overlong_tokens=257", "needs at most rollout.max_tokens (256)"),
        ("reward.overlong_tokens=256", ""),
        ("gap.mean=1e-4 model.dtype=bfloat16", "gap.mean: got 0.0001, a gate for float32, with"),
        ("gap.mean=1e-4 placement.device=gpu", "gap.mean: got 0.0001, a gate for float32, with"),
        ("gap.max=0.01 model.dtype=bfloat16", "gap.max: got 0.01, a gate for float32, with"),
        ("gap.mean=1e-4 gap.max=0.01 placement.device=gpu model.dtype=float32", ""),
        ("gap.mean=0.02 model.dtype=bfloat16", ""),
        ("data.order=easy_first", "needs data.pass_rates"),
        ("data.min_pass_rate=0.1", "data.min_pass_rate, data.max_pass_rate: 0.1 and 1 need"),
        ("data.order=easy_first data.max_pass_rate=0.9 data.pass_rates=x", ""),
        (
            "data.min_pass_rate=0.6 data.max_pass_rate=0.5 data.pass_rates=x",
            "data.min_pass_rate: got 0.6, above data.max_pass_rate (0.5)",
        ),
        (
            "reward.policy=kind",
            "reward.policy: got \"kind\", needs 'strict', 'lenient'",
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(
    tmp_path: Path, override: str, said: str
) -> None:
    both = ["placement.learners=2", "learner.updates_per_batch=2", *override.split()]
    if said:
        assert said in problems(tmp_path, GOOD, *both)
    else:
        load_config(write(tmp_path, GOOD), both)


def test_staleness_needs_a_correction_that_can_be_right(tmp_path: Path) -> None:
    stale = ["rollout.staleness=1", "learner.importance_cap=2.0"]
    load_config(write(tmp_path, GOOD), stale)
    assert "full distribution" in problems(tmp_path, GOOD, *stale, "rollout.top_p=0.9")
    assert "full distribution" in problems(tmp_path, GOOD, *stale, "rollout.top_k=50")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps=3", "not of the form"),
        ("run.name.x=3", "is a value, not a section"),
        ("run.name", "not of the form"),
    ],
)
def test_a_malformed_override_is_told(tmp_path: Path, override: str, said: str) -> None:
    assert said in problems(tmp_path, GOOD, override)


def test_a_missing_or_broken_file_is_told(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(UserError, match=r"does not exist; .*run\.toml"):
        load_config(tmp_path / "rum.toml")
    with pytest.raises(UserError, match=r"not valid TOML.*line 1"):
        load_config(write(tmp_path, "[run\n"))


def sections(model: type[BaseModel], path: str = "") -> list[tuple[str, str]]:
    found = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += sections(kind, f"{path}{name}.")
        else:
            found.append((f"{path}{name}", name))
    return found


def test_every_knob_has_a_reader() -> None:
    """A key nothing reads would be a promise nobody keeps."""
    root = Path(__file__).parents[2]
    source = "".join(
        path.read_text()
        for package in ("actors", "learner", "rewards", "data", "cluster")
        for path in (root / package).glob("*.py")
    )
    for name in ("check.py", "loader.py"):
        source += (root / "configs" / name).read_text()
    source += (root / "configs" / "schema.py").read_text().partition("def run_dir")[2]
    unread = [path for path, name in sections(Config) if f".{name}" not in source]
    assert unread == []


def test_every_shipped_config_loads() -> None:
    configs = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
    assert len(configs) >= 3
    for path in configs:
        config = load_config(path)
        assert math.isfinite(config.learner.learning_rate)
