"""The shapes that benchmarks share: the paper's work, on a model that two cores can train.

Short answers about large images: some 270 prompt tokens, two thirds of them visual, G = 8. The
model is a random Qwen2-VL of 31 million parameters that never ends a text, so that the work is the
same in every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from medrl.actors.types import Prompt

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


def question(image: str) -> Prompt:
    """About one image. A request of a benchmark has words of its own."""
    return Prompt(
        id=image,
        question="q",
        options=(),
        answer="x",
        images=(image,),
        modality="CT",
        question_type="t",
        source="bench",
    )


def coin(completion: str, prompt: object = None) -> float:
    """A reward, 0 or 1, that even a random model's answers differ in."""
    return float(crc32(completion.encode()) % 2)


NEVER = "<|vision_pad|>"
"""The model's end token: one that neither engine nor learner gives any probability
(`actors.chat.VISION_TOKENS`), so both still compute one distribution. Others must be told so."""


def make_model(folder: Path) -> Path:
    """The model's folder, made once. Its texts end at the length asked and nowhere else."""
    from medrl.data.phantoms import texts
    from medrl.learner import tiny

    path = folder / "endless"
    if not (path / "config.json").exists():
        tiny.build("qwen2_vl", path, corpus=texts(), **SIZES)
        _never_end(path)
    return path


def _never_end(path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.eos_token = NEVER
    tokenizer.save_pretrained(path)
    for kind in (AutoConfig, GenerationConfig):
        config = kind.from_pretrained(path)
        for part in (config, getattr(config, "text_config", config)):
            part.eos_token_id = tokenizer.eos_token_id
        config.save_pretrained(path)
