"""Rewards load without anything heavy: their processes must be up in a moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import medrl.rewards.pool

PROGRAM = """
import importlib, sys
for name in sys.argv[2:]:
    importlib.import_module("medrl.rewards." + name)
heavy = {"ray", "torch", "vllm", "transformers", "deepspeed", "numpy"} | set(sys.argv[1].split())
print(*sorted(heavy & set(sys.modules)))
"""


def loaded(also: str, *names: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, also, *names], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_rewards_import_nothing_heavy():
    folder = Path(medrl.rewards.pool.__file__).parent
    names = sorted(
        path.stem for path in folder.glob("*.py") if path.stem not in ("actor", "__init__")
    )
    assert {"modes", "accuracy", "format", "compose", "pool", "offline"} <= set(names)
    assert loaded("", *names) == ""


def test_a_reward_process_imports_rewards_and_types_only():
    assert loaded("pydantic asyncio", "worker") == ""
