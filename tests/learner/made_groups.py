"""Groups made by hand for the learner's tests: tiny models, drawn images, random completions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from medrl.actors.chat import render_chat
from medrl.actors.types import (
    Completion,
    Example,
    Group,
    Prompt,
    RolloutRequest,
    Sampling,
    Score,
    ScoredGroup,
)
from medrl.configs.schema import LearnerConfig, ModelConfig
from medrl.data.images import ImageStore
from medrl.learner.batch import RowBatch
from medrl.learner.model import Policy, PromptReader
from medrl.learner.settings import LearnerSettings
from medrl.learner.vision import ImageInputs

CORPUS = ["What modality is this image? A) CT B) MRI C) X-ray D) Ultrasound. Answer with a letter."]
MAX_PIXELS = 112 * 112
SIZES = {"a.png": (84, 84), "b.png": (84, 112), "c.png": (112, 84), "d.png": (56, 84)}


def draw_images(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for seed, (name, size) in enumerate(SIZES.items()):
        pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)


def image_store(model: Path | str, images: Path) -> ImageStore:
    """As the rank makes it: nothing is kept."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(model)
    return ImageStore.for_model(images, processor, MAX_PIXELS, cache_bytes=0)


def settings(
    model: Path,
    images: Path,
    *,
    freeze_vision: bool = False,
    vision_cache_gib: float = 2.0,
    gradient_checkpointing: bool = False,
    lora_rank: int = 0,
    lora_vision: bool = False,
    dtype: Any = "float32",
    total_steps: int = 10,
    **learner: Any,
) -> LearnerSettings:
    return LearnerSettings(
        model=ModelConfig(
            path=str(model),
            dtype=dtype,
            freeze_vision=freeze_vision,
            vision_cache_gib=vision_cache_gib,
            gradient_checkpointing=gradient_checkpointing,
            lora_rank=lora_rank,
            lora_vision=lora_vision,
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
    temperature: float = 1.0,
    end: int | None = None,
) -> ScoredGroup:
    """Random completions of ordinary tokens; their log-probs are noise, not a policy's. With `end`
    all but those of 16 tokens, the longest allowed, end in that token; those were cut off."""
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
        sampling=Sampling(num_completions=size, max_tokens=16, temperature=temperature),
        seed=seed,
    )
    loaded = [reader.images.source.load(path) for path in images]
    chat = render_chat(reader.processor, text, len(images))
    ids = reader.processor(text=[chat], images=[one.image for one in loaded] or None)["input_ids"][
        0
    ]
    drawn = [torch.randint(0, 250, (length,), generator=generator).tolist() for length in lengths]
    if end is not None:
        drawn = [ids if len(ids) == 16 else [*ids[:-1], end] for ids in drawn]
    completions = tuple(
        Completion(
            token_ids=tuple(ids),
            logprobs=tuple((-5 - torch.rand(length, generator=generator)).tolist()),
            text="",
            finish_reason="length" if end is not None and length == 16 else "stop",
            version=version,
        )
        for ids, length in zip(drawn, lengths, strict=True)
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


def mixed_batch(reader: PromptReader, *, groups: int = 7, size: int = 4) -> list[ScoredGroup]:
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


def examples() -> list[Example]:
    """One, two and no images; targets of uneven lengths, the longest beyond `max_tokens`."""
    images: list[tuple[str, ...]] = [(), ("a.png",), ("b.png", "d.png"), ("c.png",), ("a.png",)]
    targets = ["B", "<answer>A</answer>", "MRI. It is an image " * 4, "\n\nC", "<answer>D"]
    return [
        Example(
            request=RolloutRequest(
                draw=index,
                prompt=Prompt(
                    id=f"e{index}",
                    question="q",
                    options=(),
                    answer="x",
                    images=names,
                    modality="CT",
                    question_type="t",
                    source="s",
                ),
                text="Which?"
                if index % 2
                else "What modality is this image? Answer with a letter.",
                sampling=Sampling(num_completions=4, max_tokens=16, temperature=1.0),
                seed=index,
            ),
            target=target,
        )
        for index, (names, target) in enumerate(zip(images, targets, strict=True))
    ]


class PlainStepper:
    """A `Stepper` of one process and plain PyTorch: gradients add up in `policy`, `step` keeps the
    weights. What DeepSpeed does is compared with it."""

    def __init__(
        self,
        policy: Policy,
        reader: PromptReader,
        *,
        reference: Policy | None = None,
        before: Policy | None = None,
    ) -> None:
        """`before` stands for the policy at the start of the batch, where not `policy`."""
        self.before = before or policy
        self.rank, self.world, self.device = 0, 1, torch.device("cpu")
        self.policy, self.reference, self.reader = policy, reference, reader
        self.forwards = self.steps = 0

    def score(
        self, rows: RowBatch, images: list[ImageInputs], *, reference: bool = False
    ) -> tuple[Tensor, Tensor]:
        self.forwards += 1
        module = self.policy if torch.is_grad_enabled() else self.before
        module = self.reference if reference else module
        assert module is not None
        scored: tuple[Tensor, Tensor] = module(rows, images)
        return scored

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rate: float) -> float:
        self.steps += 1
        return float(torch.stack([g.norm() for g in self.gradients().values()]).norm())

    def reduce(self, values: Tensor, how: str) -> Tensor:
        return values

    def first_error(self, mine: str) -> str:
        return mine

    def gradients(self) -> dict[str, Tensor]:
        named = self.policy.vlm.named_parameters()
        return {name: p.grad for name, p in named if p.grad is not None}


def gradient_gap(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest relative distance of a tensor's gradients. One tensor that is nearly 0 in both does
    not count for more than its share of the whole."""
    assert got.keys() == want.keys()
    whole = float(torch.stack([g.norm() for g in want.values()]).norm())
    return max(
        float((got[name] - want[name]).norm() / (want[name].norm() + 1e-3 * whole)) for name in want
    )
