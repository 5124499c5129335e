"""A completion is learnt from only if it is whole."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from medrl.actors.vllm_calls import read_completion


def output(finish_reason: str | None, logprobs: tuple[float, ...] = (-0.5, -0.25)) -> object:
    steps = [{7 + i: SimpleNamespace(logprob=value)} for i, value in enumerate(logprobs)]
    return SimpleNamespace(token_ids=[7, 8], logprobs=steps, text="CT", finish_reason=finish_reason)


def test_a_whole_completion_keeps_tokens_logprobs_and_version() -> None:
    read = read_completion(output("length"), 3)
    assert (read.token_ids, read.logprobs, read.version) == ((7, 8), (-0.5, -0.25), 3)
    assert read.finish_reason == "length"


@pytest.mark.parametrize("reason", ["abort", "error", "repetition", None])
def test_what_vllm_ended_itself_is_refused(reason: str | None) -> None:
    with pytest.raises(ValueError, match=f"ended by {reason!r}"):
        read_completion(output(reason), 0)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_logprob_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        read_completion(output("stop", (-0.5, value)), 0)
