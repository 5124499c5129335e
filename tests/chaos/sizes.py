"""How large a soak is, and the config of its runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from faults import Phase
from real_runs import ROOT

CHECKPOINT_EVERY = 5
TIMEOUTS = {"heartbeat_s": 15.0, "sync_timeout_s": 30.0, "start_timeout_s": 200.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of a soak."""

    steps: Mapping[Phase, int]
    prompts: int
    held_out: int  # prompts of the last evaluation of "noise"; 0: no run to compare it with
    images: int  # to train on
    own: Mapping[Phase, tuple[str, ...]]  # of the config


FULL_SIZE = Size(
    steps={"equal": 200, "noise": 200},
    prompts=8,
    held_out=480,
    images=512,
    own={"equal": (), "noise": ()},
)
SHORT_SIZE = Size(
    steps={"equal": 38, "noise": 32},
    prompts=4,
    held_out=0,
    images=32,
    # Starts sooner; and the run has to wait for its only engine to come back.
    own={
        "equal": ("placement.engines=1",),
        "noise": ("placement.engines=1", "placement.learners=1"),
    },
)

CONFIG = """
[run]
name = "soak"
checkpoint_every = {every}
[model]
path = "{root}/starter"
[data]
train = "{folder}/phantoms/train"
test = "{folder}/phantoms/test"
[rollout]
prompts = {prompts}
completions = 8
max_tokens = 16
max_model_len = 256
[reward]
terms = [
    {{ use = "format" }},
    {{ use = "accuracy" }},
    {{ use = "chaos_reward:obey", weight = 0.0 }},
]
timeout_s = 3.0
max_failed_fraction = 0.3
[learner]
learning_rate = 3e-4
warmup_steps = 5
[placement]
engines = 2
learners = 2
device = "cpu"
cpus_per_process = 0.2
heartbeat_s = {heartbeat_s}
sync_timeout_s = {sync_timeout_s}
start_timeout_s = {start_timeout_s}
"""


def write_config(folder: Path, size: Size) -> Path:
    path = folder / "soak.toml"
    values = {"every": CHECKPOINT_EVERY, "root": ROOT, "folder": folder, "prompts": size.prompts}
    path.write_text(CONFIG.format(**values, **TIMEOUTS))
    return path
