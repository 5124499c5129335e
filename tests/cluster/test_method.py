"""What a run's method and data make of its config."""

from pathlib import Path

import pytest

from medrl.cluster.method import for_method, with_steps
from medrl.configs.errors import UserError
from medrl.configs.loader import load_config


def test_sft_takes_its_own_numbers_and_all_else_of_the_run(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("""
run = { name = "x", method = "sft" }
model = { path = "m" }
data = { train = "d" }
learner = { learning_rate = 1e-6, kl_coefficient = 0.04, zero_stage = 2 }
sft = { prompts = 48, learning_rate = 2e-5, warmup_steps = 7 }
""")
    config = for_method(load_config(path))
    assert config.rollout.prompts == 48
    learner = config.learner
    assert (learner.learning_rate, learner.schedule, learner.warmup_steps) == (2e-5, "cosine", 7)
    assert learner.kl_coefficient == 0  # no reference is loaded
    assert learner.zero_stage == 2
    assert for_method(config) == config  # a resumed run reads what was resolved


@pytest.mark.parametrize("mode", ["think-before", "think-after"])
def test_sft_refuses_modes_whose_reasoning_no_data_has(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f"""
run = {{ name = "x", method = "sft" }}
model = {{ path = "m" }}
data = {{ train = "d", mode = "{mode}" }}
""")
    with pytest.raises(UserError, match="no reasoning to imitate"):
        for_method(load_config(path))


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (["run.steps=9"], 9),
        (["run.steps=9", "run.epochs=1"], 13),  # 100 prompts, 8 a step
        (["run.epochs=2.5"], 32),
        (["run.method=sft", "sft.prompts=32"], 4),
        (["run.method=sft", "sft.steps=6"], 6),
    ],
)
def test_steps_follow_from_epochs(tmp_path: Path, settings: list[str], steps: int) -> None:
    path = tmp_path / "run.toml"
    path.write_text('run = { name = "x" }\nmodel = { path = "m" }\ndata = { train = "d" }\n')
    config = with_steps(for_method(load_config(path, settings)), 100)
    assert config.run.steps == steps
    assert with_steps(config, 100) == config
