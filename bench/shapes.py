"""The shapes that benchmarks share: the paper's work, on a model that two cores can train.

Short answers about large images: some 270 prompt tokens, two thirds of them visual, G = 8. The
model is a random Qwen2-VL of 29 million parameters; a benchmark forbids the end of text, so that
the work is the same in every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIDE = 392  # pixels of an image: 28 x 28 patches
VISUAL_TOKENS = 196


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A group, as the learner gets it."""

    tokens: int  # C of each completion
    prompt: int = 270  # T, the visual tokens included
    completions: int = 8  # G
    side: int = SIDE  # of its one image, pixels


THINK, NOTHINK = "medr1-think", "medr1-nothink"
SHAPES = {THINK: Shape(tokens=64), NOTHINK: Shape(tokens=8)}

SIZES: dict[str, Any] = {"hidden": 512, "layers": 8, "vision_hidden": 256, "vision_layers": 6}
"""Of `learner.tiny.build`."""


def make_model(folder: Path) -> Path:
    """The model's folder, made once."""
    from medrl.data.phantoms import texts
    from medrl.learner import tiny

    path = folder / "model"
    if not (path / "config.json").exists():
        tiny.build("qwen2_vl", path, corpus=texts(), **SIZES)
    return path
