"""A completion is learnt from only if it is whole."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from medrl.actors.vllm_calls import read_completion
from medrl.actors.vllm_engine import VllmEngine
from medrl.configs.errors import EngineError


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


async def test_a_call_in_which_vllms_process_dies_is_not_waited_for(tmp_path: Path) -> None:
    """vLLM fails the requests of a dead process, but not the other calls to it."""
    engine = object.__new__(VllmEngine)
    engine._index, engine._log, engine._log_start = 3, tmp_path / "vllm.log", 0
    engine._log.touch()
    engine._llm = SimpleNamespace(errored=True)
    with pytest.raises(EngineError, match=r"engine 3: vLLM's process died"):
        async with asyncio.timeout(5):
            await engine._while_alive(asyncio.Event().wait())
    assert await engine._while_alive(asyncio.sleep(0, "answer")) == "answer"
