from __future__ import annotations

from collections.abc import Callable

import pytest

from medrl.actors.types import Prompt


@pytest.fixture(scope="session")
def make_prompt() -> Callable[..., Prompt]:
    """Build a prompt of which only options and gold answer matter."""

    def make(
        answer: str = "C",
        options: tuple[str, ...] = ("CT", "MRI", "Ultrasound", "X-ray"),
        id: str = "row-1",
    ) -> Prompt:
        return Prompt(
            id=id,
            question="Which modality is this?",
            options=options,
            answer=answer,
            images=("a.png",),
            modality="CT",
            question_type="Modality Recognition",
            source="test",
        )

    return make
