"""Write the paper's trainings, one a source, as configs/med_r1/*.toml.

    python bench/med_r1_configs.py [FOLDER]

Eight modalities and five question types, each for Qwen2-VL-2B and Qwen2.5-VL-3B: all keys are those
of configs/med_r1_qwen2vl_2b.toml, except for model, data and steps. Change them there or here, and
run this again; a test says when the files are behind.
"""

from __future__ import annotations

import math
import sys
import tomllib
from pathlib import Path
from typing import Any

import tomli_w

CONFIGS = Path(__file__).parents[1] / "configs"

MODELS = {
    "qwen2vl_2b": "Qwen/Qwen2-VL-2B-Instruct",
    "qwen2_5vl_3b": "Qwen/Qwen2.5-VL-3B-Instruct",
}

# Name here: (division, file of the released splits, training prompts in it).
SOURCES = {
    "ct": ("modality", "CT(Computed Tomography)", 12_567),
    "mri": ("modality", "MR (Mag-netic Resonance Imaging)", 25_507),
    "xray": ("modality", "X-Ray", 6_301),
    "ultrasound": ("modality", "ultrasound", 8_917),
    "dermoscopy": ("modality", "Dermoscopy", 5_373),
    "fundus": ("modality", "Fundus Photography", 4_300),
    "oct": ("modality", "OCT (Optical Coherence Tomography", 3_798),
    "microscopy": ("modality", "Microscopy Images", 4_570),
    "anatomy": ("question_type", "Anatomy Identification", 13_119),
    "disease": ("question_type", "Disease Diagnosis", 44_329),
    "grading": ("question_type", "Lesion Grading", 1_662),
    "recognition": ("question_type", "Modality Recognition", 9_173),
    "attributes": ("question_type", "Other Biological Attributes", 2_794),
}


def config_text(model: str, source: str) -> str:
    """Return the file of one training."""
    division, file, prompts = SOURCES[source]
    tree: dict[str, Any] = tomllib.loads((CONFIGS / "med_r1_qwen2vl_2b.toml").read_text("utf-8"))
    tree["run"]["name"] = f"med_r1_{model}_{source}"
    tree["run"]["steps"] = math.ceil(prompts / tree["rollout"]["prompts"])
    tree["model"]["path"] = MODELS[model]
    for split in ("train", "test"):
        tree["data"][split] = f"data/Splits/{division}/{split}/{file}_{split}.json"
    return (
        f"# Med-R1 on {file}: one epoch of {prompts:,} prompts. Written by\n"
        "# bench/med_r1_configs.py after configs/med_r1_qwen2vl_2b.toml, which says why.\n\n"
        f"{tomli_w.dumps(tree)}"
    )


def write_all(folder: Path) -> list[Path]:
    """Write all files; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for model in MODELS:
        for source in SOURCES:
            path = folder / f"{model}_{source}.toml"
            path.write_text(config_text(model, source), encoding="utf-8")
            written.append(path)
    return written


if __name__ == "__main__":
    paths = write_all(Path(sys.argv[1]) if len(sys.argv) > 1 else CONFIGS / "med_r1")
    print(f"{len(paths)} files in {paths[0].parent}")
