"""What many tests start from: a tiny model, a few phantoms, a config that is right."""

from pathlib import Path

import pytest

from medrl.data import phantoms
from medrl.learner import tiny
from medrl.rewards.modes import MODES


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT/train and OUT/test in OmniMedVQA's layout; 160 and 160 questions."""
    out = tmp_path_factory.mktemp("phantoms")
    phantoms.generate(out, train=32, test=32, seed=3)
    return out


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2-VL whose tokenizer knows the phantoms' words."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    corpus = [*phantoms.texts(), *(mode.instruction for mode in MODES.values())]
    tiny.build("qwen2_vl", folder, corpus=corpus)
    return folder


@pytest.fixture
def config_text(tmp_path: Path, tiny_model: Path, phantom_folder: Path) -> str:
    """A whole run of two steps, as TOML."""
    return f"""
[run]
name = "test"
dir = "{tmp_path / "runs"}"
steps = 2
[model]
path = "{tiny_model}"
[data]
train = "{phantom_folder / "train"}"
test = "{phantom_folder / "test"}"
[rollout]
prompts = 4
completions = 4
max_tokens = 8
max_model_len = 256
[learner]
learning_rate = 1e-3
[placement]
engines = 2
learners = 2
device = "cpu"
cpus_per_process = 0.4
[eval]
max_prompts = 16
"""
