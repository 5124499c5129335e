"""Tiny models are whole Hugging Face folders: transformers loads and runs them as they are."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from medrl.learner import tiny

CORPUS = ("What modality is this?", "A) CT", "B) MR", "Answer inside <answer></answer>.") * 20
QUESTION = "What modality is this?\nA) CT\nB) MR"


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    tiny.build(request.param, path, corpus=CORPUS, hidden=64, vision_hidden=32)
    return path


def inputs_of(folder: Path, width: int, height: int) -> tuple[str, Any]:
    processor = transformers.AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels)]
    return text, processor(text=[text], images=images, return_tensors="pt")


@pytest.mark.parametrize(("width", "height"), [(84, 84), (112, 56)])
def test_image_tokens_are_as_many_as_merged_patches(folder: Path, width: int, height: int) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    _, inputs = inputs_of(folder, width, height)
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert visual == int(inputs["image_grid_thw"].prod()) // 4
    assert visual == {84: 9, 112: 8}[width]
    assert model(**inputs).logits.shape == (1, *inputs["input_ids"].shape[1:], len_of(folder))


def len_of(folder: Path) -> int:
    return len(transformers.AutoTokenizer.from_pretrained(folder))


def test_the_image_is_seen(folder: Path) -> None:
    """Another picture, other logits: the tower is joined to the language model."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    _, inputs = inputs_of(folder, 84, 84)
    with torch.no_grad():
        one = model(**inputs).logits[:, -1]
        inputs["pixel_values"] = -inputs["pixel_values"]
        other = model(**inputs).logits[:, -1]
    assert (one - other).abs().max() > 1e-3


def test_the_chat_template_puts_the_image_before_the_text(folder: Path) -> None:
    text, _ = inputs_of(folder, 84, 84)
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    processor = transformers.AutoProcessor.from_pretrained(folder)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "B"}]
    assert processor.apply_chat_template(turns, tokenize=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
    )


def test_any_text_survives_the_tokenizer_and_special_tokens_are_one_token(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("<answer>C</answer>", "größer als 3 µm\n\tA) 中", "Answer inside <answer>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for token in tiny.SPECIAL_TOKENS:
        assert tokenizer(token)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]
    assert set(tokenizer.all_special_tokens) == set(tiny.SPECIAL_TOKENS)


def test_generation_ends_at_the_turns_end(folder: Path) -> None:
    config = transformers.GenerationConfig.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.eos_token == "<|im_end|>"
    assert config.top_k in (None, 50)  # a model default such as top_k=1 would undo sampling


@pytest.mark.parametrize("tied", [True, False])
def test_tied_means_one_matrix(tmp_path: Path, tied: bool) -> None:
    tiny.build("qwen2_vl", tmp_path, corpus=CORPUS, tied=tied, hidden=64, vision_hidden=32)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    assert model.config.tie_word_embeddings is tied


def test_the_seed_alone_decides_the_weights(tmp_path: Path) -> None:
    digests = []
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        state = torch.random.get_rng_state()
        tiny.build(
            "qwen2_vl", tmp_path / name, corpus=CORPUS, seed=seed, hidden=64, vision_hidden=32
        )
        assert torch.equal(state, torch.random.get_rng_state())  # the caller's dice are left alone
        weights = (tmp_path / name / "model.safetensors").read_bytes()
        digests.append(hashlib.sha256(weights).hexdigest())
    assert digests[0] == digests[1] != digests[2]


def test_a_head_size_that_no_engine_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hidden=48"):
        tiny.build("qwen2_vl", tmp_path, corpus=CORPUS, hidden=48)
