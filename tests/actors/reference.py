"""What engines are compared with: transformers' own model and processor, used plainly."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from medrl.actors.chat import forbidden_token_ids, render_chat
from medrl.actors.types import Group, Prompt, RolloutRequest, Sampling, Sent, SyncPlan, WeightMeta
from medrl.data.images import ImageStore
from medrl.learner.transports import Sender, open_sender
from medrl.learner.weight_source import ModuleSource

MAX_PIXELS = 448 * 448
LONG = "Look at the picture and say which organ is shown. Reason about each option. " * 3


def draw_images(folder: Path, count: int = 4) -> list[str]:
    """Write different 84x84 pictures; returns their names."""
    rng = np.random.default_rng(0)
    names = [f"{number}.png" for number in range(count)]
    for name in names:
        pixels = rng.integers(0, 255, (84, 84, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return names


def request(
    images: tuple[str, ...] = ("0.png",),
    *,
    text: str = LONG,
    n: int = 4,
    max_tokens: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
) -> RolloutRequest:
    prompt = Prompt(
        id=f"{'+'.join(images)}/{seed}",
        question=text,
        options=(),
        answer="lung",
        images=images,
        modality="CT",
        question_type="organ",
        source="drawn",
    )
    sampling = Sampling(num_completions=n, max_tokens=max_tokens, temperature=temperature)
    return RolloutRequest(draw=seed, prompt=prompt, text=text, sampling=sampling, seed=seed)


class Reference:
    """One process, one model: the learner's side of a sync, and log-probs by a plain forward."""

    def __init__(self, folder: Path, image_root: Path) -> None:
        self.processor: Any = transformers.AutoProcessor.from_pretrained(folder)
        self.model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        self.forbidden = list(forbidden_token_ids(self.processor.tokenizer))
        config = self.model.config.vision_config
        factor = config.patch_size * config.spatial_merge_size
        self.images = ImageStore(image_root, MAX_PIXELS, factor)
        self._sender: Sender | None = None

    def inputs(self, group: Group) -> Any:
        """The prompt as `AutoProcessor` makes it of text and images."""
        load = self.images.blank if group.request.blind else self.images.load
        images = [load(path).image for path in group.request.prompt.images]
        text = render_chat(self.processor, group.request.text, len(images))
        return self.processor(text=[text], images=images or None, return_tensors="pt")

    @torch.no_grad()
    def forward_logprobs(self, group: Group) -> tuple[tuple[float, ...], ...]:
        inputs = self.inputs(group)
        prompt = inputs.pop("input_ids")
        inputs.pop("attention_mask")
        types = inputs.pop("mm_token_type_ids")
        rows = []
        for completion in group.completions:
            answer = torch.tensor([completion.token_ids])
            logits = self.model(
                input_ids=torch.cat([prompt, answer], 1),
                mm_token_type_ids=torch.cat([types, torch.zeros_like(answer)], 1),
                **inputs,
            ).logits[0, prompt.shape[1] - 1 : -1]
            logits[:, self.forbidden] = -torch.inf
            logprobs = (logits / (group.request.sampling.temperature or 1.0)).log_softmax(-1)
            rows.append(tuple(logprobs.gather(1, answer[0, :, None])[:, 0].tolist()))
        return tuple(rows)

    def change(self, part: str, size: float, seed: int = 1) -> None:
        """Add noise to the parameters with `part` in their name, as an update would."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if part in name:
                    parameter += size * torch.randn(parameter.shape, generator=generator)

    async def logprobs(self, group: Group) -> tuple[tuple[float, ...], ...]:
        return await asyncio.to_thread(self.forward_logprobs, group)

    async def weights(self) -> tuple[WeightMeta, ...]:
        return ModuleSource(self.model).metadata()

    async def transfer_address(self) -> tuple[str, int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return "127.0.0.1", free.getsockname()[1]

    async def open_transfer(self, plan: SyncPlan) -> None:
        source = ModuleSource(self.model)
        source.lay_out()
        self._sender = await asyncio.to_thread(open_sender, plan, 0, source)

    async def send(self) -> Sent:
        assert self._sender is not None
        return await asyncio.to_thread(self._sender.send)
