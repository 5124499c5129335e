"""Two journals of one schedule, step by step: what is the same, and the first that is not.

Tokens, versions and image hashes are compared as they are. Scores, losses and norms are the same
within `TOLERANCE`, absolute below 1 and relative above: float32 holds no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from medrl.cluster.recording import completions_of

TOLERANCE = 1e-6

Row = Mapping[str, Any]

_EQUAL = ("prompt_id", "image_hashes", "version", "token_ids", "finish_reason", "outcome")
"""In the order of cause and effect."""

_CLOSE = ("reward", "advantage")

_NUMBERS = ("loss", "gradient_norm", "kl", "entropy", "clip_fraction", "importance.mean")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A step of a run and of its replay."""

    step: int
    completions: int
    tokens: int
    loss: tuple[float, float]  # then, now
    gradient_norm: tuple[float, float]
    logprobs_apart: float  # largest |then - now| where tokens are the same, nats; not judged
    difference: str  # the first, "": none

    @property
    def same(self) -> bool:
        return not self.difference


def compare_step(then: Path, now: Path, was: Row, is_: Row) -> Comparison:
    """Compare a step that stands in both run directories; `was` and `is_`: its lines of metrics."""
    step = was["step"]
    old, new = (pq.read_table(completions_of(run, step)).to_pylist() for run in (then, now))
    found = next(chain(_of_completions(old, new), _of_numbers(was, is_)), "")
    return Comparison(
        step=step,
        completions=len(new),
        tokens=sum(len(row["token_ids"]) for row in new),
        loss=(was["loss"], is_["loss"]),
        gradient_norm=(was["gradient_norm"], is_["gradient_norm"]),
        logprobs_apart=_logprobs_apart(old, new),
        difference=f"step {step}, {found}" if found else "",
    )


def _of_completions(old: Sequence[Row], new: Sequence[Row]) -> Iterator[str]:
    """Causes before effects: a token of the last group may be why an advantage of it differs."""
    if [row["draw"] for row in old] != [row["draw"] for row in new]:
        yield "other draws, or in another order"
        return
    pairs = list(zip(old, new, strict=True))
    for key in (*_EQUAL, *_CLOSE):
        for row, (then, now) in enumerate(pairs):
            if sentence := _of_key(key, then, now):
                draws = [one["draw"] for one in old]
                place = row - draws.index(then["draw"])
                yield (
                    f"draw {then['draw']} (prompt {then['prompt_id']}), completion {place}: "
                    f"{sentence}"
                )


def _of_key(key: str, then: Row, now: Row) -> str:
    if then[key] == now[key] or (key in _CLOSE and _close(then[key], now[key])):
        return ""
    if key == "token_ids":
        return _of_tokens(then[key], now[key])
    return f"{key} was {then[key]}, is {now[key]}" + (
        _components(then, now) if key == "reward" else ""
    )


def _of_tokens(then: Sequence[int], now: Sequence[int]) -> str:
    for place, (was, is_) in enumerate(zip(then, now, strict=False)):
        if was != is_:
            return f"token {place} was {was}, is {is_}"
    return f"had {len(then)} tokens, has {len(now)}, the same as far as both go"


def _components(then: Row, now: Row) -> str:
    old, new = ({one["name"]: one["value"] for one in row["scores"]} for row in (then, now))
    return "" if old == new else f" (scores were {old}, are {new})"


def _of_numbers(then: Row, now: Row) -> Iterator[str]:
    if not math.isclose(then["learning_rate"], now["learning_rate"], rel_tol=TOLERANCE):
        yield (
            f"learning_rate was {then['learning_rate']!r}, is {now['learning_rate']!r}: was the "
            "run resumed with other settings? config.toml has the last ones"
        )
    for key in _NUMBERS:
        if key in then and not _close(then[key], now[key]):
            yield f"{key} was {then[key]!r}, is {now[key]!r}"


def _close(then: float | None, now: float | None) -> bool:
    if then is None or now is None or math.isnan(then):
        return then is now or (now is not None and math.isnan(now))
    return math.isclose(then, now, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _logprobs_apart(old: Sequence[Row], new: Sequence[Row]) -> float:
    return max(
        (
            abs(was - is_)
            for then, now in zip(old, new, strict=False)
            if then["token_ids"] == now["token_ids"]
            for was, is_ in zip(then["logprobs"], now["logprobs"], strict=True)
        ),
        default=0.0,
    )
