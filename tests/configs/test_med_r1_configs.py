"""The paper's trainings: all are there, all load, each is one epoch of its source."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from medrl.configs.loader import load_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "med_r1"
MODELS = {"qwen2vl_2b": "Qwen2-VL-2B", "qwen2_5vl_3b": "Qwen2.5-VL-3B"}

# Training prompts of the released split files, and how the files are called.
MODALITIES = {
    "ct": ("CT(Computed Tomography)", 12567),
    "mri": ("MR (Mag-netic Resonance Imaging)", 25507),
    "xray": ("X-Ray", 6301),
    "ultrasound": ("ultrasound", 8917),
    "dermoscopy": ("Dermoscopy", 5373),
    "fundus": ("Fundus Photography", 4300),
    "oct": ("OCT (Optical Coherence Tomography", 3798),
    "microscopy": ("Microscopy Images", 4570),
}
QUESTION_TYPES = {
    "anatomy": ("Anatomy Identification", 13119),
    "disease": ("Disease Diagnosis", 44329),
    "grading": ("Lesion Grading", 1662),
    "recognition": ("Modality Recognition", 9173),
    "attributes": ("Other Biological Attributes", 2794),
}
SOURCES = {
    **{name: ("modality", *rest) for name, rest in MODALITIES.items()},
    **{name: ("question_type", *rest) for name, rest in QUESTION_TYPES.items()},
}


def test_the_counts_add_up_to_those_of_the_data_set() -> None:
    """Each division covers OmniMedVQA's training items (a single one has no modality)."""
    assert sum(count for _, count in MODALITIES.values()) == 71334 - 1
    assert sum(count for _, count in QUESTION_TYPES.values()) == 71077


def test_there_is_a_file_for_each_model_and_source() -> None:
    want = {f"{model}_{source}.toml" for model in MODELS for source in SOURCES}
    assert {path.name for path in FOLDER.iterdir()} == want
    assert len(want) == 26


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_training_is_one_epoch_as_the_paper_ran_it(model: str, source: str) -> None:
    config = load_config(FOLDER / f"{model}_{source}.toml")
    division, file, count = SOURCES[source]
    assert config.run.steps == math.ceil(count / config.rollout.prompts)
    assert config.data.train == f"data/Splits/{division}/train/{file}_train.json"
    assert config.data.test == f"data/Splits/{division}/test/{file}_test.json"
    assert MODELS[model] in config.model.path
    assert (config.rollout.prompts, config.rollout.completions) == (4, 4)
    assert (config.learner.kl_coefficient, config.learner.kl_gradient) == (0.04, "paper")
    assert (config.learner.learning_rate, config.learner.schedule) == (1e-6, "linear")
    assert config.data.format == "med_r1"


def test_names_of_runs_differ_so_that_no_run_overwrites_another() -> None:
    names = [load_config(path).run.name for path in FOLDER.iterdir()]
    assert len(set(names)) == len(names)


def test_the_files_are_what_their_script_writes(tmp_path: Path) -> None:
    script = ROOT / "bench" / "med_r1_configs.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    for path in sorted(tmp_path.iterdir()):
        assert path.read_text("utf-8") == (FOLDER / path.name).read_text("utf-8"), path.name
