"""What is asked of vLLM for a group, and what it answers, read strictly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from medrl.actors.types import Completion, FinishReason, RolloutRequest


def sampling_params(request: RolloutRequest, ban: Mapping[int, float]) -> Any:
    """Every field that shapes the distribution, explicitly."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    wanted = request.sampling
    return SamplingParams(
        n=wanted.num_completions,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        top_k=wanted.top_k or -1,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        seed=request.seed,  # vLLM draws completion i from seed + i
        stop=None,
        ignore_eos=False,
        max_tokens=wanted.max_tokens,
        min_tokens=wanted.min_tokens,
        logit_bias=dict(ban),
        logprobs=0,  # the sampled token's only
        skip_special_tokens=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def read_completion(output: Any, version: int) -> Completion:
    """vLLM's `CompletionOutput`, sampled from `version`. Raises `ValueError` where it is not whole:
    vLLM has more ways to end a completion ("abort", "error") than there are to learn from."""
    if output.finish_reason not in get_args(FinishReason):
        raise ValueError(f"a completion ended by {output.finish_reason!r}, not by itself")
    tokens = tuple(output.token_ids)
    steps = zip(tokens, output.logprobs, strict=True)
    logprobs = tuple(step[token].logprob for token, step in steps)
    if not all(map(math.isfinite, logprobs)):
        raise ValueError("a completion's log-probs must be finite, got nan or inf")
    return Completion(
        token_ids=tokens,
        logprobs=logprobs,
        text=output.text,
        finish_reason=output.finish_reason,
        version=version,
    )
