"""Groups made by hand for the learner's tests: tiny models, drawn images, random completions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from medrl.actors.chat import render_chat
from medrl.actors.types import (
    Completion,
    Group,
    Prompt,
    RolloutRequest,
    Sampling,
    Score,
    ScoredGroup,
)
from medrl.configs.schema import LearnerConfig, ModelConfig
from medrl.learner.model import PromptReader
from medrl.learner.settings import LearnerSettings

CORPUS = ["What modality is this image? A) CT B) MRI C) X-ray D) Ultrasound. Answer with a letter."]
MAX_PIXELS = 112 * 112
SIZES = {"a.png": (84, 84), "b.png": (84, 112), "c.png": (112, 84), "d.png": (56, 84)}


def draw_images(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for seed, (name, size) in enumerate(SIZES.items()):
        pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)


def settings(
    model: Path,
    images: Path,
    *,
    freeze_vision: bool = False,
    gradient_checkpointing: bool = False,
    dtype: Any = "float32",
    total_steps: int = 10,
    **learner: Any,
) -> LearnerSettings:
    return LearnerSettings(
        model=ModelConfig(
            path=str(model),
            dtype=dtype,
            freeze_vision=freeze_vision,
            gradient_checkpointing=gradient_checkpointing,
        ),
        learner=LearnerConfig(**({"learning_rate": 1e-3, "schedule": "constant"} | learner)),
        image_root=images,
        max_pixels=MAX_PIXELS,
        max_tokens=16,
        total_steps=total_steps,
        seed=0,
        device="cpu",
        collective_timeout_s=60,
    )


def scored_group(
    reader: PromptReader,
    images: Sequence[str],
    *,
    seed: int,
    rewards: Sequence[float],
    lengths: Sequence[int] | None = None,
    failed: Sequence[int] = (),
    text: str = "What modality is this image?",
    version: int = 0,
) -> ScoredGroup:
    """Random completions of ordinary tokens; their log-probs are noise, not a policy's."""
    generator = torch.Generator().manual_seed(seed)
    size = len(rewards)
    lengths = lengths or torch.randint(1, 9, (size,), generator=generator).tolist()
    request = RolloutRequest(
        draw=seed,
        prompt=Prompt(
            id=f"p{seed}",
            question="q",
            options=(),
            answer="x",
            images=tuple(images),
            modality="CT",
            question_type="t",
            source="s",
        ),
        text=text,
        sampling=Sampling(num_completions=size, max_tokens=16, temperature=1.0),
        seed=seed,
    )
    loaded = [reader._images.load(path) for path in images]
    chat = render_chat(reader.processor, text, len(images))
    ids = reader.processor(text=[chat], images=[one.image for one in loaded] or None)["input_ids"][
        0
    ]
    completions = tuple(
        Completion(
            token_ids=tuple(torch.randint(0, 250, (length,), generator=generator).tolist()),
            logprobs=tuple((-5 - torch.rand(length, generator=generator)).tolist()),
            text="",
            finish_reason="stop",
            version=version,
        )
        for length in lengths
    )
    return ScoredGroup(
        group=Group(
            request=request,
            prompt_token_ids=tuple(ids),
            image_hashes=tuple(one.sha256 for one in loaded),
            completions=completions,
            engine=0,
            seconds=0.0,
        ),
        scores=tuple(
            Score(components={}, total=reward, outcome="error" if i in failed else "ok")
            for i, reward in enumerate(rewards)
        ),
        seconds=0.0,
    )


def mixed_batch(reader: PromptReader, *, groups: int = 6, size: int = 4) -> list[ScoredGroup]:
    """One, two and no images, failed completions, a group of equal rewards, uneven lengths."""
    images: list[tuple[str, ...]] = [("a.png",), ("b.png", "d.png"), (), ("c.png",), ("a.png",), ()]
    batch = []
    for seed in range(groups):
        rewards = torch.randint(
            0, 3, (size,), generator=torch.Generator().manual_seed(seed + 50)
        ).tolist()
        batch.append(
            scored_group(
                reader,
                images[seed % len(images)],
                seed=seed,
                rewards=[1.0] * size if seed == 4 else rewards,
                lengths=[1, 14, 2, 3][:size] if seed == 3 else None,
                failed=(1,) if seed == 1 else (),
                text="Which?" if seed % 2 else "What modality is this image? Answer with a letter.",
            )
        )
    return batch
