"""Tiny vision-language models of three families: for tests, and the clay the starter is made of.

`build` writes a whole Hugging Face folder with random weights: transformers' Auto classes and vLLM
load it as they load the full-size model of that family. transformers only; no vLLM, no DeepSpeed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX, Qwen2Tokenizer

Family = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
FAMILIES: tuple[Family, ...] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# As Qwen's, but without its default system turn: a tiny model has no tokens to spare.
CHAT_TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>
{%- elif part['type'] == 'text' %}{{ part['text'] }}
{%- endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

HEAD_DIM = 32  # of the language model: vLLM's attention kernel on the CPU knows 32 and 64, not 16
_INITIALIZER_RANGE = 0.05  # at 0.02 so narrow a model's logits are all alike
_MAX_POSITIONS = 4096
_MIN_PIXELS, _MAX_PIXELS = 28 * 28, 448 * 448  # at most 256 visual tokens an image


def build(
    family: Family,
    folder: Path,
    *,
    corpus: Iterable[str],
    seed: int = 0,
    tied: bool = True,
    hidden: int = 128,
    layers: int = 2,
    vision_hidden: int = 64,
    vision_layers: int = 2,
    vocabulary: int = 1024,
) -> None:
    """Write a tiny `family` model into `folder` (made if absent); same arguments, same weights.

    `hidden` (a multiple of 64) and `layers` are the language model's; `vision_hidden` (a multiple
    of 32) and `vision_layers` the tower's. The byte-level tokenizer is trained on `corpus` and has
    at most `vocabulary` tokens besides the special ones. An 84x84 image is 9 visual tokens.
    """
    if hidden % (2 * HEAD_DIM) or vision_hidden % HEAD_DIM:
        raise ValueError(
            f"hidden={hidden} must be a multiple of {2 * HEAD_DIM} and "
            f"vision_hidden={vision_hidden} of {HEAD_DIM}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus, vocabulary)
    text = _text_config(family, tokenizer, hidden, layers, tied)
    vision = _vision_config(family, vision_hidden, vision_layers, hidden)
    ids = {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }
    config = transformers.AutoConfig.for_model(
        family, text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids
    )
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForImageTextToText.from_config(config)
    model.generation_config = _generation_config(tokenizer)
    model.save_pretrained(folder)
    _processor(family, tokenizer).save_pretrained(folder)


def train_tokenizer(corpus: Iterable[str], vocabulary: int) -> Qwen2Tokenizer:
    """A byte-level BPE of Qwen's kind: any text can be encoded, special tokens come last."""
    bpe = Tokenizer(BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                pattern=Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    model = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token=None,  # byte level: nothing is unknown
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=_MAX_POSITIONS,
        chat_template=CHAT_TEMPLATE,
    )


def _text_config(
    family: Family, tokenizer: Qwen2Tokenizer, hidden: int, layers: int, tied: bool
) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": [4, 6, 6],  # time, height, width: HEAD_DIM / 2 pairs in all
    }
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": hidden // HEAD_DIM // 2,
        "max_position_embeddings": _MAX_POSITIONS,
        "initializer_range": _INITIALIZER_RANGE,
        "rope_parameters": rope,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "tie_word_embeddings": tied,
    }
    if family == "qwen3_vl":
        config["head_dim"] = HEAD_DIM
        rope |= {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
    return config


def _vision_config(family: Family, width: int, depth: int, hidden: int) -> dict[str, Any]:
    common = {
        "depth": depth,
        "num_heads": width // HEAD_DIM,
        "initializer_range": _INITIALIZER_RANGE,
    }
    if family == "qwen2_vl":
        return common | {"embed_dim": width, "hidden_size": hidden, "mlp_ratio": 3}
    own = {"hidden_size": width, "out_hidden_size": hidden, "intermediate_size": 3 * width}
    if family == "qwen2_5_vl":  # windows of 2x2 visual tokens, so that 84x84 has more than one
        return common | own | {"window_size": 56, "fullatt_block_indexes": [depth - 1]}
    return common | own | {"num_position_embeddings": 36, "deepstack_visual_indexes": [0]}


def _generation_config(tokenizer: Qwen2Tokenizer) -> transformers.GenerationConfig:
    return transformers.GenerationConfig(
        do_sample=True,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )


def _processor(family: Family, tokenizer: Qwen2Tokenizer) -> Any:
    size = {"shortest_edge": _MIN_PIXELS, "longest_edge": _MAX_PIXELS}
    if family == "qwen3_vl":
        half = [0.5, 0.5, 0.5]
        images = transformers.Qwen2VLImageProcessor(
            size=size, patch_size=16, image_mean=half, image_std=half
        )
        videos: Any = transformers.Qwen3VLVideoProcessor(size=size)
        kind: Any = transformers.Qwen3VLProcessor
    else:
        images = transformers.Qwen2VLImageProcessor(size=size)
        videos = transformers.Qwen2VLVideoProcessor(size=size)
        kind = transformers.Qwen2VLProcessor
        if family == "qwen2_5_vl":
            kind = transformers.Qwen2_5_VLProcessor
    return kind(images, tokenizer, videos, chat_template=CHAT_TEMPLATE)
