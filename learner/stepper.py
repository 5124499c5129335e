"""The seam between a learner's steps and whatever holds the weights, and how all ranks refuse.

Every refusal is of all ranks, for a rank that went on alone would wait for ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from medrl.configs.errors import LearnerError
from medrl.learner.batch import RowBatch
from medrl.learner.model import PromptReader
from medrl.learner.vision import ImageInputs

T = TypeVar("T")


class Stepper(Protocol):
    """One rank of whatever holds the weights. Every call is made by all ranks, in one order."""

    rank: int
    world: int
    device: torch.device

    def score(
        self, rows: RowBatch, images: list[ImageInputs], *, reference: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the rows' tokens, [B, S, C]; `images` of `rows.images`."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss` to the sum over ranks; `last` before a step."""
        ...

    def step(self, learning_rate: float) -> float:
        """One optimiser step, but none where the gradient is not finite; returns its norm before
        clipping."""
        ...

    def reduce(self, values: Tensor, how: str) -> Tensor:
        """ "sum" or "max" over ranks, elementwise."""
        ...

    def first_error(self, mine: str) -> str:
        """The first rank's error that is not empty."""
        ...


def refuse(stepper: Stepper, error: str) -> None:
    """Raise on every rank what any rank has to say; nothing where all are silent."""
    if error := stepper.first_error(error):
        raise LearnerError(error)


def on_all_ranks(stepper: Stepper, work: Callable[[], T]) -> T:
    """What `work` gives on this rank. Raises `LearnerError` on all where it failed on any."""
    error = ""
    try:
        result = work()
    except Exception as problem:
        error = str(problem) or type(problem).__name__
    refuse(stepper, error)
    return result


def read_images(stepper: Stepper, reader: PromptReader, rows: RowBatch) -> list[ImageInputs]:
    """Of a micro-batch. One that left the cache is read again, and may have changed."""
    return on_all_ranks(stepper, lambda: [reader.image(hash) for hash in rows.images])


def refuse_not_finite(stepper: Stepper, what: str, value: float, version: int, hint: str) -> None:
    """No number may reach the weights of `version` that is none; `hint` says what to do."""
    error = ""
    if not math.isfinite(value):
        error = (
            f"step {version + 1}: the {what} is {value}, so the optimiser step was not made and "
            f"the weights are those of the step before; {hint}"
        )
    refuse(stepper, error)
