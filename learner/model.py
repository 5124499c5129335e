"""The vision-language model: with `learner.vision` and `levels`, all that knows a family's keys.

`PromptReader` turns a group's prompt into model inputs and refuses one that is not what the engine
sampled from. `Policy` wraps the model: rows in, log-probs and entropies of completion tokens out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medrl.actors.chat import forbidden_token_ids, render_chat
from medrl.actors.types import Group, RolloutRequest
from medrl.configs.errors import LearnerError, UserError
from medrl.learner import attention
from medrl.learner.batch import BlankImage, PromptInputs, RowBatch
from medrl.learner.head import LogProbHead
from medrl.learner.images import ImageCache, ImageSource, seen_by
from medrl.learner.levels import ImageProcessor
from medrl.learner.vision import FeatureCache, ImageInputs, VisionEncoder

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

BLANK_HASH = "blank"
"""Stands for the hash of the image that only keeps the vision tower running."""

_BLANK_SIDE = 32  # pixels; the processor scales it to the smallest image it knows


def read_config(path: str, *, trust: bool = False) -> Any:
    """The model's configuration. Raises `UserError` where `path` holds none of a known family.

    `trust`: run code of the model's own, where it has any, here and below."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path {path}: cannot be loaded: {error}") from error
    if config.model_type not in FAMILIES:
        raise UserError(
            f"model.path {path}: is a {config.model_type} model, needs one of {', '.join(FAMILIES)}"
        )
    if "sliding_attention" in (getattr(config.text_config, "layer_types", None) or ()):
        raise UserError(f"model.path {path}: has sliding-window attention, which rows do not have")
    return config


class PromptReader:
    """Processor side of the model."""

    def __init__(
        self, path: str, images: ImageSource, *, cache_bytes: int = 4 * 2**30, trust: bool = False
    ) -> None:
        from PIL import Image
        from transformers import AutoProcessor

        self.config: Any = read_config(path, trust=trust)
        self.processor: Any = AutoProcessor.from_pretrained(path, trust_remote_code=trust)
        process = ImageProcessor(self.processor.image_processor)
        self.images = ImageCache(images, process, cache_bytes)
        self.forbidden = forbidden_token_ids(self.processor.tokenizer)
        self._blank = process(Image.new("RGB", (_BLANK_SIDE, _BLANK_SIDE)))
        self.blank = BlankImage(
            hash=BLANK_HASH, token_id=self.config.image_token_id, tokens=self._blank.tokens
        )
        self._rope = _rope_index(self.config)

    def read_images(self, requests: Iterable[RolloutRequest]) -> None:
        """All at once, which is faster than one by one in `read` or `inputs`."""
        self.images.read(seen for request in requests for seen in seen_by(request))

    def read(self, group: Group) -> PromptInputs:
        """Raises `LearnerError` where the prompt is not the one the engine sampled from."""
        prompt = group.request.prompt
        hashes = self._hashes_of(group.request)
        if hashes != group.image_hashes:
            raise LearnerError(
                f"prompt {prompt.id}: the images {list(prompt.images)} here are not those that "
                f"were sampled from (SHA-256 {_short(hashes)} here, "
                f"{_short(group.image_hashes)} in the engine): a file changed or differs "
                "between machines"
            )
        inputs = self.inputs(group.request)
        ids = inputs.token_ids.tolist()
        if tuple(ids) != group.prompt_token_ids:
            raise LearnerError(_different_ids(prompt.id, ids, group, self.config.image_token_id))
        return inputs

    def inputs(self, request: RolloutRequest) -> PromptInputs:
        """The prompt as an engine would be given it."""
        hashes = self._hashes_of(request)
        images = [self.image(hash) for hash in hashes]
        text = render_chat(self.processor, request.text, len(hashes))
        ids = torch.tensor(self._token_ids(text, images))
        positions, following = self._positions(ids, images)
        return PromptInputs(
            token_ids=ids, positions=positions, next_position=following, images=hashes
        )

    def image(self, hash: str) -> ImageInputs:
        """The processed image of a hash `read` has met."""
        if hash == BLANK_HASH:
            return self._blank
        return self.images.get(hash)

    def _hashes_of(self, request: RolloutRequest) -> tuple[str, ...]:
        return tuple(self.images.hash(seen) for seen in seen_by(request))

    def _token_ids(self, text: str, images: list[ImageInputs]) -> list[int]:
        """As the processor does it, but for the image work: a placeholder a visual token."""
        parts = text.split(self.processor.image_token)
        pieces = [parts[0]]
        for part, image in zip(parts[1:], images, strict=True):
            pieces += [self.processor.image_token * image.tokens, part]
        ids: list[int] = self.processor.tokenizer("".join(pieces))["input_ids"]
        return ids

    def _positions(self, ids: Tensor, images: list[ImageInputs]) -> tuple[Tensor, int]:
        """[3, T] M-RoPE positions, and the position of the next token."""
        if not images:
            return torch.arange(len(ids)).expand(3, -1), len(ids)
        positions, _ = self._rope(
            input_ids=ids[None],
            mm_token_type_ids=(ids == self.config.image_token_id).int()[None],
            image_grid_thw=torch.stack([image.grid for image in images]),
        )
        return positions[:, 0], int(positions.max()) + 1


def _rope_index(config: Any) -> Any:
    """The family's own `get_rope_index`, which needs the config only: no weights are made."""
    from transformers import AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(config).get_rope_index


def _short(hashes: tuple[str, ...]) -> str:
    return ", ".join(hash[:12] for hash in hashes) or "none"


def _different_ids(prompt: str, ids: list[int], group: Group, image_token: int) -> str:
    theirs = list(group.prompt_token_ids)
    here, there = ids.count(image_token), theirs.count(image_token)
    pairs = zip(ids, theirs, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(theirs)))
    return (
        f"prompt {prompt}: token ids here are not those that were sampled from "
        f"({len(ids)} tokens here, {len(theirs)} in the engine; {here} and {there} of them visual; "
        f"first difference at {first}): learner and engine must load the same model folder"
    )


class Policy(nn.Module):
    """A vision-language model that scores the completions of rows."""

    def __init__(
        self, vlm: Any, forbidden: Sequence[int] = (), features: FeatureCache | None = None
    ) -> None:
        """`forbidden`: token ids that get no probability (`actors.chat.forbidden_token_ids`).
        `features`: keeps what the tower makes of images, as long as it is not trained."""
        super().__init__()
        self.vlm = vlm
        self.vision = VisionEncoder(vlm, features or FeatureCache(0))
        vlm.lm_head.__class__ = LogProbHead  # same module, same weights (tied ones stay tied)
        ids = torch.tensor(forbidden, dtype=torch.long)
        vlm.lm_head.register_buffer("forbidden", ids, persistent=False)

    def forward(self, batch: RowBatch, images: list[ImageInputs]) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of `batch.present` tokens, 0 elsewhere: [B, S, C] float32.

        `images`: one for every hash of `batch.images`.
        """
        encoded = self.vision.encode(batch.images, images) if images else None
        layout = attention.Layout(
            prompt_lengths=batch.prompt_lengths,
            prompt=batch.prompt,
            slots=batch.slots,
            length=batch.length,
        )
        hidden = self.vlm.model(
            input_ids=batch.input_ids,
            position_ids=batch.positions,
            mm_encoder_outputs=encoded,
            use_cache=False,
            **{attention.LAYOUT: layout},
        ).last_hidden_state  # [B, T+S*C, D]
        row, slot, token = batch.present.nonzero(as_tuple=True)
        # A completion's first token is predicted by the prompt's last, the others by their left.
        left = batch.prompt + slot * batch.length + token - 1
        left = torch.where(token == 0, batch.prompt_lengths[row] - 1, left)
        logprobs, entropies = self.vlm.lm_head(
            hidden[row, left], batch.targets[batch.present], batch.temperatures[row]
        )
        blank = torch.zeros(batch.present.shape, device=logprobs.device)
        return (
            blank.masked_scatter(batch.present, logprobs),
            blank.masked_scatter(batch.present, entropies),
        )


def load_policy(
    path: str,
    dtype: torch.dtype,
    *,
    forbidden: Sequence[int] = (),
    freeze_vision: bool = False,
    gradient_checkpointing: bool = False,
    features: FeatureCache | None = None,
    trust: bool = False,
) -> Policy:
    """Raises `UserError` where `path` holds no model of a known family, or not all of one."""
    from transformers import AutoModelForImageTextToText

    read_config(path, trust=trust)
    attention.register()
    vlm: Any
    vlm, loading = AutoModelForImageTextToText.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation={"text_config": attention.NAME, "vision_config": "sdpa"},
        trust_remote_code=trust,
        output_loading_info=True,
    )
    if absent := sorted(loading["missing_keys"]):  # transformers would draw them at random
        raise UserError(
            f"model.path {path} lacks {len(absent)} of the model's tensors, first {absent[0]}: its "
            "files are not complete, or of another model than its config.json says"
        )
    vlm.train()
    if freeze_vision:
        vlm.model.visual.requires_grad_(False)
    if gradient_checkpointing:
        vlm.gradient_checkpointing_enable({"use_reentrant": False})
    return Policy(vlm, forbidden, features)


def save_model(
    policy: Policy, state: dict[str, Tensor], reader: PromptReader, folder: Path
) -> None:
    """Write a folder that transformers and vLLM load: `state` whole, by `vlm`'s own names."""
    policy.vlm.save_pretrained(folder, state_dict=state)
    reader.processor.save_pretrained(folder)
