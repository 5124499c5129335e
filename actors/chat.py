"""How a prompt's text becomes a model's chat prompt: one function for engine and learner alike.

Both sides render with it, so the tokens that are trained are the tokens that were sampled.
Standard library only; the tokenizer or processor is handed in.
"""

from __future__ import annotations

from typing import Protocol


class ChatTemplate(Protocol):
    """What is needed of a `transformers` processor or tokenizer."""

    def apply_chat_template(
        self, conversation: list[dict[str, object]], /, **options: object
    ) -> object: ...


def render_chat(template: ChatTemplate, text: str, num_images: int) -> str:
    """One user turn, images first and then `text`, opened for the assistant; not tokenized."""
    content: list[dict[str, object]] = [{"type": "image"} for _ in range(num_images)]
    content.append({"type": "text", "text": text})
    rendered = template.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    if not isinstance(rendered, str):
        raise ValueError(f"the chat template gave {type(rendered).__name__}, needs a string")
    return rendered


VISION_TOKENS = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


class Vocabulary(Protocol):
    """What is needed of a `transformers` tokenizer."""

    def get_vocab(self) -> dict[str, int]: ...


def forbidden_token_ids(tokenizer: Vocabulary) -> tuple[int, ...]:
    """Ids no completion may hold: they stand for pixels that a completion does not have.

    The engine sets their logits to -inf before it samples. That renormalises the distribution, so
    the learner must set the same ids to -inf before its log-softmax: then both sides' log-probs
    are of one policy. Sorted; without those the vocabulary lacks.
    """
    vocabulary = tokenizer.get_vocab()
    return tuple(sorted(vocabulary[token] for token in VISION_TOKENS if token in vocabulary))
