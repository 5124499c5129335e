"""Imports go one way, and what needs no heavy library loads without one."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("ray", "vllm", "deepspeed", "transformers", "torch")

# Module -> heavy libraries it may load. The maths is torch's; the rest is plain Python.
LIGHT = {
    "medrl.learner.grpo": ("torch",),
    "medrl.actors.buffer": (),
    "medrl.actors.pool": (),
    "medrl.actors.sampler": (),
    "medrl.actors.fake_engine": (),
    "medrl.learner.fake_learner": (),
    "medrl.configs.loader": (),
    "medrl.rewards.compose": (),
    "medrl.rewards.pool": (),
    "medrl.data.load": (),
    "medrl.cluster.loop": (),
    "medrl.cluster.supervise": (),
    "medrl.cluster.sync": (),
    "medrl.cluster.cli": (),
    "medrl.bench.frame": (),
}

ALLOWED = {
    "configs": {"configs"},
    "actors": {"actors", "configs", "data"},
    "rewards": {"rewards", "actors", "configs"},
    "data": {"data", "actors", "configs"},
    "learner": {"learner", "actors", "configs", "data"},
    "reports": {"reports", "data", "rewards", "actors", "configs"},
    "cluster": {"cluster", "reports", "learner", "rewards", "data", "actors", "configs"},
    "bench": {"bench", "cluster", "reports", "learner", "rewards", "data", "actors", "configs"},
}

OWNERS = {  # heavy library -> files that may import it, at any depth
    "vllm": {
        "actors/vllm_engine.py",
        "actors/vllm_calls.py",
        "actors/vllm_start.py",
        "actors/gloo_receiver.py",
        "actors/loaders.py",
        "actors/copy_plan.py",
        "actors/gpu_receivers.py",
        "learner/gpu_senders.py",
    },
    "deepspeed": {"learner/deepspeed_engine.py"},
    "peft": {"learner/lora.py"},
    "trl": {"bench/trl_trainer.py"},
}


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_no_heavy_library(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    loaded = ast.literal_eval(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
        ).stdout
    )
    assert set(loaded) <= set(LIGHT[module])


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_those_below_them(package: str) -> None:
    for path in (ROOT / package).glob("*.py"):
        if path.name.startswith("starter"):
            continue  # a recipe, not part of the system: it uses all of it
        used = {n.split(".")[1] for n in imported(path) if n.startswith("medrl.")}
        assert used <= ALLOWED[package], f"{path.name} imports {used - ALLOWED[package]}"


@pytest.mark.parametrize("library", OWNERS)
def test_a_heavy_library_has_one_owner(library: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for package in ALLOWED
        for path in (ROOT / package).glob("*.py")
        if any(name.split(".")[0] == library for name in imported(path))
    }
    assert users <= OWNERS[library]


def test_the_loop_and_the_maths_fit_on_a_screen() -> None:
    loop = ast.parse((ROOT / "cluster" / "loop.py").read_text())
    code = loop.body[1:]  # less the picture
    assert (code[-1].end_lineno or 0) - code[0].lineno < 80
    assert len((ROOT / "learner" / "grpo.py").read_text().splitlines()) <= 150
