"""What a sync compares: digests of both sides, and log-probs of the canary."""

from __future__ import annotations

import math
from collections.abc import Mapping

from medrl.actors.types import Group


def first_difference(sent: Mapping[str, str], received: Mapping[str, str]) -> str:
    """The first tensor whose digests differ, and what each side says; empty: all are equal."""
    for name, expected in sent.items():
        if (got := received.get(name, "nothing")) != expected:
            return f"{name}: sent {expected}, received {got}"
    extra = sorted(received.keys() - sent.keys())
    return f"{extra[0]}: received, but never sent" if extra else ""


def logprob_gap(group: Group, logprobs: tuple[tuple[float, ...], ...]) -> float:
    """Largest difference over all tokens of all completions, nats; not a number if one is not.

    `logprobs` is [G][C]."""
    gaps = [
        abs(engine - learner)
        for completion, row in zip(group.completions, logprobs, strict=True)
        for engine, learner in zip(completion.logprobs, row, strict=True)
    ]
    return math.nan if any(map(math.isnan, gaps)) else max(gaps)
