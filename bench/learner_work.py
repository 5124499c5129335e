"""One batch of groups at the paper's shape, and the passes a learner can make over it.

A random Qwen2-VL of 29 million parameters (`tiny.build`), random images, random completions.
No Ray, no vLLM, no DeepSpeed: one process, plain PyTorch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from medrl.actors.types import (
    Completion,
    Group,
    RolloutRequest,
    Sampling,
    Score,
    ScoredGroup,
)
from medrl.bench.shapes import Shape, make_model, question
from medrl.configs.schema import LearnerConfig, ModelConfig
from medrl.data.images import ImageStore
from medrl.learner.batch import RowBatch
from medrl.learner.grpo import group_advantages
from medrl.learner.model import Policy, PromptReader, load_policy
from medrl.learner.settings import LearnerSettings
from medrl.learner.update import Updater
from medrl.learner.vision import FeatureCache, ImageInputs

_MAX_PIXELS = 448 * 448


class PlainStepper:
    """A `learner.stepper.Stepper` of one process that adds gradients up and makes no step."""

    def __init__(self, policies: Sequence[Policy]) -> None:
        """The policy, and its reference if there is one."""
        self.rank, self.world, self.device = 0, 1, torch.device("cpu")
        self._policies = policies

    def score(
        self, rows: RowBatch, images: list[ImageInputs], *, reference: bool = False
    ) -> tuple[Tensor, Tensor]:
        scored: tuple[Tensor, Tensor] = self._policies[int(reference)](rows, images)
        return scored

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rate: float) -> float:
        return 0.0

    def reduce(self, values: Tensor, how: str) -> Tensor:
        return values

    def first_error(self, mine: str) -> str:
        return mine


@dataclass(frozen=True, kw_only=True)
class Work:
    """A batch, and models of the same weights: the learner's, its reference, transformers' own."""

    reader: PromptReader
    policies: tuple[Policy, ...]  # the trained one, and a reference where KL counts
    cache: FeatureCache
    usual_model: Any
    updater: Updater
    batch: tuple[ScoredGroup, ...]

    @property
    def patches(self) -> int:
        """Of one image."""
        (first, *_) = self.batch[0].group.image_hashes
        return int(self.reader.image(first).grid.prod())

    def seconds(self, run: Callable[[Work], object]) -> float:
        began = time.perf_counter()
        run(self)
        return time.perf_counter() - began

    def ours(self) -> None:
        self.updater.update(self.batch, version=0)

    def usual(self) -> None:
        """GRPO's loss at ratio 1, which is -A times the mean log-prob of a completion, by
        transformers alone: a padded row a completion, a group at a time."""
        for scored in self.batch:
            rewards = torch.tensor([[score.total for score in scored.scores]])
            advantages = group_advantages(rewards, torch.ones_like(rewards, dtype=torch.bool))[0]
            logprobs = self._usual_logprobs(scored.group)
            loss = -(logprobs.mean(1) * advantages).mean() / len(self.batch)
            loss.backward()  # type: ignore[no-untyped-call]

    def _usual_logprobs(self, group: Group) -> Tensor:
        """[G, C]; all rows are of one length, so there is nothing to mask."""
        completions = torch.tensor([one.token_ids for one in group.completions])
        prompt = torch.tensor(group.prompt_token_ids).expand(len(completions), -1)
        ids = torch.cat([prompt, completions], dim=1)
        image = self.reader.image(group.image_hashes[0])
        logits = self.usual_model(
            input_ids=ids,
            mm_token_type_ids=(ids == self.reader.config.image_token_id).int(),
            pixel_values=image.pixels.to(ids.device).repeat(len(ids), 1),
            image_grid_thw=image.grid.repeat(len(ids), 1),
            logits_to_keep=completions.shape[1] + 1,
            use_cache=False,
        ).logits[:, :-1]
        logits = logits.index_fill(-1, torch.tensor(self.reader.forbidden), -torch.inf)
        found: Tensor = logits.log_softmax(-1).gather(-1, completions[..., None])[..., 0]
        return found

    def forget_gradients(self) -> None:
        self.policies[0].zero_grad()
        self.usual_model.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        """Of whichever model ran last."""
        for model in (self.policies[0].vlm, self.usual_model):
            named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            if named:
                return named
        raise ValueError("no model has a gradient")


def make_work(
    folder: Path,
    shape: Shape,
    *,
    groups: int,
    model: Mapping[str, Any] | None = None,
    learner: Mapping[str, Any] | None = None,
) -> Work:
    """`groups` groups of `shape`, each about an image of its own. The model is made in `folder`,
    once; `model` and `learner` are keys of these config sections."""
    path, images = make_model(folder), folder / "images"
    settings = LearnerSettings(
        model=ModelConfig(path=str(path), **(model or {})),
        learner=LearnerConfig(**(learner or {})),
        image_root=images,
        max_pixels=_MAX_PIXELS,
        max_tokens=shape.tokens,
        total_steps=1,
        seed=0,
        device="cpu",
    )
    names = [_draw(images, shape.side, index) for index in range(groups)]
    reader = PromptReader(str(path), _image_store(images, path))
    cache = FeatureCache(int(settings.model.vision_cache_gib * 2**30))
    policies = tuple(
        load_policy(
            str(path),
            torch.float32,
            forbidden=reader.forbidden,
            freeze_vision=settings.model.freeze_vision,
            features=cache,
        )
        for _ in range(1 + bool(settings.learner.kl_coefficient))
    )
    return Work(
        reader=reader,
        policies=policies,
        cache=cache,
        usual_model=_transformers_own(path),
        updater=Updater(PlainStepper(policies), reader, settings),
        batch=tuple(_group(reader, name, index, shape) for index, name in enumerate(names)),
    )


def _draw(folder: Path, side: int, index: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{side}_{index}.png"
    if not (folder / name).exists():
        pixels = np.random.default_rng(index).integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return name


def _image_store(root: Path, model: Path) -> ImageStore:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(model)
    return ImageStore.for_model(root, processor, _MAX_PIXELS, cache_bytes=0)


def _transformers_own(path: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.train()


def _group(reader: PromptReader, image: str, index: int, shape: Shape) -> ScoredGroup:
    """Random completions; half of them are right."""
    request = _request(reader, image, index, shape)
    inputs = reader.inputs(request)
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(0, 250, (shape.completions, shape.tokens), generator=generator)
    completions = tuple(
        Completion(
            token_ids=tuple(row),
            logprobs=(-5.0,) * shape.tokens,
            text="",
            finish_reason="length",
            version=0,
        )
        for row in ids.tolist()
    )
    group = Group(
        request=request,
        prompt_token_ids=tuple(inputs.token_ids.tolist()),
        image_hashes=inputs.images,
        completions=completions,
        engine=0,
        seconds=0.0,
    )
    scores = tuple(
        Score(components={}, total=float(i % 2), outcome="ok") for i in range(shape.completions)
    )
    return ScoredGroup(group=group, scores=scores, seconds=0.0)


def _request(reader: PromptReader, image: str, index: int, shape: Shape) -> RolloutRequest:
    """With as many words as make the prompt `shape.prompt` tokens long."""
    bare = RolloutRequest(
        draw=index,
        prompt=question(image),
        text="?",
        sampling=Sampling(
            num_completions=shape.completions, max_tokens=shape.tokens, temperature=1.0
        ),
        seed=index,
    )
    words = shape.prompt - len(reader.inputs(bare).token_ids)
    request = replace(bare, text="?" + " the" * words)
    if (found := len(reader.inputs(request).token_ids)) != shape.prompt:
        raise ValueError(f"a prompt of {found} tokens, wanted {shape.prompt}")
    return request
