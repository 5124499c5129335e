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
