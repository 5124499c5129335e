"""What the starter's recipe feeds its model with, and how it is measured. PyTorch + transformers.

Letters: B questions, T tokens of prompt and completion padded at the end, K visual tokens an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from medrl.actors.types import Prompt
from medrl.configs.schema import DataConfig
from medrl.data.load import load_prompts
from medrl.rewards.accuracy import strict
from medrl.rewards.modes import NO_THINK, Mode

IGNORED = -100  # label of a token that is not learnt: torch's cross entropy skips it
Answer = tuple[Mode, str]  # how it was asked, and a completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Questions and their pictures, in memory."""

    prompts: tuple[Prompt, ...]
    pictures: NDArray[np.uint8]  # [images, height, width, 3]
    picture_of: NDArray[np.int64]  # [prompts], index into `pictures`

    @classmethod
    def read(cls, folder: Path) -> Pool:
        """Read a tree of phantoms."""
        loaded = load_prompts(DataConfig(train=str(folder)), "train", images=False)
        paths = sorted({prompt.images[0] for prompt in loaded.prompts})
        pictures = [
            np.asarray(Image.open(loaded.image_root / path).convert("RGB")) for path in paths
        ]
        place = {path: index for index, path in enumerate(paths)}
        return cls(
            prompts=loaded.prompts,
            pictures=np.stack(pictures),
            picture_of=np.array([place[prompt.images[0]] for prompt in loaded.prompts]),
        )


class Student:
    """A model and its processor, with the few calls the recipe needs."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.tokenizer = processor.tokenizer
        self.end: int = model.generation_config.eos_token_id
        self.image: int = model.config.image_token_id
        self._prompt_ids: dict[tuple[str, str], list[int]] = {}

    def pixels(self, pictures: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        """Patches [B*patches, values] and grid [B, 3] as the processor makes them."""
        channels_first = list(torch.from_numpy(pictures).permute(0, 3, 1, 2))
        out = self.processor.image_processor(images=channels_first, return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"]

    def see(self, pictures: NDArray[np.uint8]) -> Tensor:
        """Visual tokens [B, K, hidden], as the language model gets them."""
        pixels, grid = self.pixels(pictures)
        return torch.stack(self.model.get_image_features(pixels, grid).pooler_output)

    def prompt_ids(self, prompt: Prompt, mode: Mode, visual_tokens: int) -> list[int]:
        """The chat template's prompt, image first, its placeholder expanded."""
        text = mode.render(prompt)
        key = (mode.name, text)
        if key not in self._prompt_ids:
            content = [{"type": "image"}, {"type": "text", "text": text}]
            chat = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            chat = chat.replace("<|image_pad|>", "<|image_pad|>" * visual_tokens)
            self._prompt_ids[key] = self.tokenizer(chat)["input_ids"]
        return self._prompt_ids[key]

    def loss(self, prompts: Sequence[Prompt], answers: Sequence[Answer], seen: Tensor) -> Tensor:
        """Mean cross entropy of the answers' tokens; `seen` [B, K, hidden] are the images."""
        rows, labels = [], []
        for prompt, (mode, completion) in zip(prompts, answers, strict=True):
            asked = self.prompt_ids(prompt, mode, seen.shape[1])
            said = [*self.tokenizer(completion)["input_ids"], self.end]
            rows.append(torch.tensor(asked + said))
            labels.append(torch.tensor([IGNORED] * len(asked) + said))
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.end)
        wanted = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        learnt = wanted[:, 1:] != IGNORED
        hidden = self._forward(ids, seen)[:, :-1][learnt]
        return torch.nn.functional.cross_entropy(self.model.lm_head(hidden), wanted[:, 1:][learnt])

    def _forward(self, ids: Tensor, seen: Tensor) -> Tensor:
        """Last hidden states [B, T, hidden]. Padding is at the end, where causality hides it."""
        side = round(seen.shape[1] ** 0.5) * self.model.config.vision_config.spatial_merge_size
        out = self.model.model(
            input_ids=ids,
            mm_token_type_ids=(ids == self.image).int(),
            image_grid_thw=torch.tensor([[1, side, side]]).expand(len(ids), 3),
            mm_encoder_outputs={"image": SimpleNamespace(pooler_output=tuple(seen))},
            use_cache=False,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    @torch.no_grad()
    def answer(
        self,
        prompts: Sequence[Prompt],
        pictures: NDArray[np.uint8],
        *,
        temperature: float,
        mode: Mode = NO_THINK,
        max_tokens: int = 16,
    ) -> list[str]:
        """Complete each prompt; temperature 0 is greedy."""
        pixels, grid = self.pixels(pictures)
        visual = int(grid[0].prod()) // self.model.config.vision_config.spatial_merge_size**2
        asked = [self.prompt_ids(prompt, mode, visual) for prompt in prompts]
        batch = self.tokenizer.pad({"input_ids": asked}, padding_side="left", return_tensors="pt")
        choose: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            choose = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        out = self.model.generate(
            **batch,
            pixel_values=pixels,
            image_grid_thw=grid,
            mm_token_type_ids=(batch["input_ids"] == self.image).int(),
            max_new_tokens=max_tokens,
            **choose,
        )
        texts = out[:, batch["input_ids"].shape[1] :]
        decoded: list[str] = self.tokenizer.batch_decode(texts, skip_special_tokens=True)
        return decoded


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """How a student did. Shares of all completions, but for `right_if_read`."""

    strict: float  # right, read from exactly one answer tag
    form: float  # well-formed
    right_if_read: float  # right among those with a readable answer

    def __str__(self) -> str:
        return f"strict {self.strict:.3f}, form {self.form:.3f}, right {self.right_if_read:.3f}"


def mark(
    student: Student, pool: Pool, *, temperature: float, mode: Mode = NO_THINK, count: int = 0
) -> Marks:
    """Mark the student's answers to the first `count` questions of a pool; 0: all."""
    count = count or len(pool.prompts)
    tokens = 16 if mode is NO_THINK else 48
    scores, form = [], 0
    for start in range(0, count, 128):
        chosen = range(start, min(start + 128, count))
        prompts = [pool.prompts[i] for i in chosen]
        pictures = pool.pictures[pool.picture_of[chosen]]
        said = student.answer(
            prompts, pictures, temperature=temperature, mode=mode, max_tokens=tokens
        )
        scores += [strict(mode, prompt, text) for prompt, text in zip(prompts, said, strict=True)]
        form += sum(mode.is_well_formed(text)[0] for text in said)
    read = [score.total for score in scores if score.outcome != "unparsed"]
    return Marks(
        strict=sum(score.total for score in scores) / count,
        form=form / count,
        right_if_read=sum(read) / max(1, len(read)),
    )
