"""What a person is told before a run starts, though nothing is wrong."""

from pathlib import Path

import pytest

from medrl.cluster.preflight import check_inputs
from medrl.configs.loader import load_config


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["learner.algorithm=gspo"], "learner.ratio, learner.clip_low, learner.clip_high change"),
        (["learner.algorithm=gspo", "learner.updates_per_batch=2"], ""),
        (["learner.clip_high=0.28"], "learner.clip_high change nothing while"),
        (["learner.algorithm=dr_grpo"], ""),
        (["run.method=sft", "learner.clip_high=0.28"], ""),
    ],
)
def test_keys_of_the_ratio_that_one_step_a_batch_leaves_idle_are_named(
    tmp_path: Path, config_text: str, settings: list[str], said: str
) -> None:
    """Else algorithms would be compared that make the same update."""
    path = tmp_path / "run.toml"
    path.write_text(config_text)
    settings = [*settings, "placement.learners=1"]
    config = load_config(path, settings)
    notes = " ".join(check_inputs(config, config.model.path).notes)
    assert (said in notes) if said else ("updates_per_batch" not in notes)
