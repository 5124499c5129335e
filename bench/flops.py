"""Multiplications of a forward and backward pass, counted by hand from a model's configuration.

A matrix product of [m, k] and [k, n] is 2 m k n operations; its backward pass is two of that size.
Attention counts the pairs that see each other, and nothing for the softmax. So the count is the
least that any implementation does: no padding, no masked pair, nothing computed again.
"""

from __future__ import annotations

from typing import Any, Literal

_FORWARD_AND_BACKWARD = 3
Way = Literal["shared", "padded", "usual"]


def of_pass(
    config: Any, way: Way, *, prompt: int, completions: int, tokens: int, patches: int
) -> int:
    """Operations for one group: `completions` of `tokens` tokens after a prompt of `prompt` whose
    image has `patches` patches. shared: prompt and image once; padded: the prompt with every
    completion; usual: prompt and image with every completion."""
    prompts = 1 if way == "shared" else completions
    images = completions if way == "usual" else 1
    of_text = prompts * prompt + completions * tokens
    pairs = prompts * _triangle(prompt) + completions * (tokens * prompt + _triangle(tokens))
    text = config.text_config
    forward: int = (
        of_text * _text_token(text)
        + pairs * _pair(text)
        + completions * tokens * 2 * text.hidden_size * text.vocab_size
        + images * tower(config.vision_config, patches)
    )
    pixels = images * patches * _embedding(config.vision_config)  # nobody wants their gradient
    return _FORWARD_AND_BACKWARD * forward - pixels


def tower(vision: Any, patches: int) -> int:
    """The forward pass of Qwen2-VL's vision tower over one image."""
    width, merge = vision.embed_dim, vision.spatial_merge_size**2
    block = 2 * (4 * width * width + 2 * vision.mlp_ratio * width * width) + 4 * patches * width
    merger = 2 * merge * width * (merge * width + vision.hidden_size) // merge
    of_patch: int = _embedding(vision) + vision.depth * int(block) + merger
    return patches * of_patch


def _embedding(vision: Any) -> int:
    """Of one patch of pixels."""
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return 2 * int(pixels) * int(vision.embed_dim)


def _text_token(text: Any) -> int:
    """Linear layers, one token."""
    hidden, heads = text.hidden_size, text.num_attention_heads
    of_keys = hidden // heads * text.num_key_value_heads
    attention = 2 * hidden * hidden + 2 * hidden * of_keys
    of_layer: int = 2 * (attention + 3 * hidden * text.intermediate_size)
    return of_layer * int(text.num_hidden_layers)


def _pair(text: Any) -> int:
    """A query's product with a key and with its value, all heads and layers."""
    return 4 * int(text.num_hidden_layers) * int(text.hidden_size)


def _triangle(size: int) -> int:
    return size * (size + 1) // 2
