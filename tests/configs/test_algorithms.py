"""`learner.algorithm` names a whole variant, and never overrules what a file says itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from medrl.configs.algorithms import PRESETS
from medrl.configs.errors import UserError
from medrl.configs.loader import dump_config, load_config
from medrl.configs.schema import Config, LearnerConfig

GOOD = """
[run]
name = "x"
[model]
path = "some/model"
[data]
train = "train"
"""


def load(tmp_path: Path, text: str = GOOD, *overrides: str) -> Config:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return load_config(path, overrides)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_its_keys_and_no_other(name: str) -> None:
    default, chosen = LearnerConfig().model_dump(), LearnerConfig(algorithm=name).model_dump()
    changed = {key: value for key, value in chosen.items() if value != default[key]}
    assert changed == dict(PRESETS[name]) | ({"algorithm": name} if name != "grpo" else {})


@pytest.mark.parametrize("name", PRESETS)
def test_a_run_shows_what_was_resolved_and_reading_that_gives_the_same(
    name: str, tmp_path: Path
) -> None:
    config = load(tmp_path, GOOD, f"learner.algorithm={name}", "rollout.max_tokens=100")
    shown = dump_config(config)
    assert load(tmp_path, shown) == config
    learner = shown.partition("[learner]")[2]
    for key, value in PRESETS[name].items():
        assert f"{key} = {value!r}".replace("'", '"').replace("True", "true") in learner


def test_what_the_file_or_an_override_names_wins(tmp_path: Path) -> None:
    text = GOOD + '[learner]\nalgorithm = "dapo"\nclip_high = 0.2\n'  # the default's value, too
    config = load(tmp_path, text, "learner.mask_truncated=false", "rollout.max_replaced=0")
    assert (config.learner.clip_high, config.learner.mask_truncated) == (0.2, False)
    assert config.learner.aggregation == "token_mean"
    assert (config.rollout.max_replaced, config.reward.overlong_tokens) == (0, 51)
    config = load(tmp_path, text, "reward.overlong_tokens=7")
    assert (config.rollout.max_replaced, config.reward.overlong_tokens) == (8, 7)


def test_dapo_is_more_than_its_loss(tmp_path: Path) -> None:
    """Dynamic sampling and soft punishment, which other algorithms do not have, come with it."""
    for name in PRESETS:
        config = load(
            tmp_path, GOOD, f"learner.algorithm={name}", "rollout.prompts=6", "rollout.max_tokens=3"
        )
        found = (config.rollout.max_replaced, config.reward.overlong_tokens)
        assert found == ((6, 1) if name == "dapo" else (0, 0))


def test_a_number_of_a_preset_may_be_written_as_an_integer(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD, "learner.algorithm=cispo", "learner.clip_high=2")
    assert config.learner.clip_high == 2.0


def test_problems_beside_an_algorithm_are_told_as_ever(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, GOOD, "learner.algorithm=dapo", "learner.clip_hi=1", "learner.clip_low='a'")
    assert sorted(str(caught.value).splitlines()) == [
        "learner.clip_hi: unknown key; did you mean 'clip_high'?",
        'learner.clip_low: got "a", needs a number',
    ]
    with pytest.raises(
        UserError, match=r"learner\.algorithm: got \"ppo\", needs 'grpo', 'dr_grpo'"
    ):
        load(tmp_path, GOOD, "learner.algorithm=ppo")
    with pytest.raises(UserError, match=r"learner\.algorithm: got \[\"dapo\"\], needs"):
        load(tmp_path, GOOD, "learner.algorithm=['dapo']")
    with pytest.raises(ValidationError):
        LearnerConfig.model_validate(3)
