"""A small config that is right, for runs on the real engines."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_runs import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def config(folder: Path, phantom_folder: Path) -> Path:
    path = folder / "run.toml"
    path.write_text(f"""
[run]
name = "whole"
steps = 3
[model]
path = "{ROOT / "starter"}"
[data]
train = "{phantom_folder / "train"}"
test = "{phantom_folder / "test"}"
[rollout]
prompts = 4
completions = 4
max_tokens = 24
max_model_len = 256
[learner]
learning_rate = 3e-4
[placement]
engines = 2
learners = 2
device = "cpu"
cpus_per_process = 0.2
[eval]
every = 3
max_prompts = 40
""")
    return path
