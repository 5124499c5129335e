"""The gate on the gap: |engine's log-prob - learner's| of the tokens that were trained, nats.

It must vanish, but for rounding, where engine and learner hold the same version, and three things
can be why it does not:

- *inputs*: other tokens or other images. The learner compares the ids and the images' hashes of
  every prompt before it trains, and refuses what differs; so this never gets here.
- *weights*: an engine computes with others than it was given. Seen in that all its groups are off
  and those of other engines are not, or in that no receipt proves its version.
- *arithmetic*: the rest. The receipt proves the weights, the engines agree with each other.

Tokens of older versions are left out, since training is what moved them (`logprob_gap.stale`). With
rollout.staleness above 0 that is soon all of them: the canary of each sync then stands alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from medrl.actors.types import Receipt, ScoredGroup, UpdateMetrics
from medrl.configs.check import LEAST_BFLOAT16_GAP, LEAST_BFLOAT16_MAX_GAP
from medrl.configs.errors import GapError, UserError
from medrl.configs.schema import GapConfig

PATIENCE = 3  # steps in a row above the limit stop a run
FAR = 10.0  # times the limit stops it at once


@dataclass(frozen=True, slots=True)
class GapLimits:
    """Of one batch."""

    mean: float  # nats
    max: float  # nats


LIMITS = {"float32": GapLimits(1e-4, 1e-2), "bfloat16": GapLimits(0.05, 5.0)}
"""Measured in float32 on CPUs: mean below 1e-6, max below 1e-5; what is wrong starts at 0.04 (a
stale copy of a tied head). In bfloat16 each engine rounds in its own way: means of 0.001 to 0.02
are healthy, and of many thousand tokens some rare one is always off by 1 or more."""


def gap_limits(config: GapConfig, dtype: Literal["float32", "bfloat16"]) -> GapLimits:
    """Those of the config, or of the type. Raises `UserError`."""
    made = LIMITS[dtype]
    limits = GapLimits(config.mean or made.mean, config.max or made.max)
    least = GapLimits(LEAST_BFLOAT16_GAP, LEAST_BFLOAT16_MAX_GAP)
    problems = [
        f"gap.{key}: got {getattr(limits, key):g}, and the weights are bfloat16, whose rounding "
        f"alone is more; needs at least {getattr(least, key):g}, or 0 for {getattr(made, key):g}"
        for key in ("mean", "max")
        if dtype == "bfloat16" and getattr(limits, key) < getattr(least, key)
    ]
    if problems:
        raise UserError(*problems)
    return limits


class GapGate:
    """Looks at each batch; remembers how many in a row were above the limit, and why."""

    def __init__(self, limits: GapLimits) -> None:
        self._limits = limits
        self._above = 0  # steps in a row
        self._times = 0.0  # how many times the limit the last one had
        self.cause = ""  # what is wrong with the last batch; empty: nothing

    def forget(self) -> None:
        """Begin anew, as after going back to a checkpoint."""
        self._above, self._times, self.cause = 0, 0.0, ""

    def look(
        self, batch: Sequence[ScoredGroup], update: UpdateMetrics, receipt: Receipt | None
    ) -> None:
        """`receipt`: of the last sync before the update, which proves the version it was from."""
        self._times = self._excess(update)
        if not update.gap_tokens:
            return  # nothing of the learner's own version: neither good nor bad
        if self._times <= 1:
            self._above, self.cause = 0, ""
            return
        self._above += 1
        limits = self._limits
        numbers = (
            "log-probs of engines and learner, at one version, differ by "
            f"{update.logprob_gap_mean:.2g} on average and {update.logprob_gap_max:.2g} at most "
            f"over {update.gap_tokens} tokens (gap.mean {limits.mean:g}, gap.max {limits.max:g}). "
        )
        self.cause = numbers + blame(batch, update, receipt, limits)

    def refuse(self) -> None:
        """Raise `GapError` where the run must not go on. To be called between updates."""
        if self._above >= PATIENCE or (self._above and self._times > FAR):
            raise GapError(
                f"{self.cause}. Stopped after {self._above} such step(s), which the last "
                "checkpoint holds: go on from an earlier one if scores fell"
            )

    def _excess(self, update: UpdateMetrics) -> float:
        """How many times above its limit the gap is; infinite where it is no number."""
        if not update.gap_tokens:
            return 0.0
        pairs = (
            (update.logprob_gap_mean, self._limits.mean),
            (update.logprob_gap_max, self._limits.max),
        )
        return max(gap / limit if math.isfinite(gap) else math.inf for gap, limit in pairs)


def blame(
    batch: Sequence[ScoredGroup],
    update: UpdateMetrics,
    receipt: Receipt | None,
    limits: GapLimits,
) -> str:
    """Which of the three it is, on what evidence, and what to do."""
    same = f"inputs are the same (ids and image hashes of {len(batch)} prompts were compared); "
    if receipt is None:
        return same + "weights differ: no receipt proves what the engines hold; restart the run"
    proof = (
        f"version {receipt.version} arrived with equal digests at all engines, canary gap "
        f"{receipt.canary_gap:.1g}"
    )
    gaps = gaps_by_engine(batch, update)
    off = [engine for engine, values in gaps.items() if min(values) > limits.max]
    good = [engine for engine, values in gaps.items() if max(values) <= limits.max]
    if off and good:
        largest = {engine: max(values) for engine, values in sorted(gaps.items())}
        told = ", ".join(f"engine {engine} {gap:.1g}" for engine, gap in largest.items())
        return (
            f"{same}weights differ: {proof}, but all groups of {_listed(off)} are off and none of "
            f"{_listed(good)} (largest gaps: {told}); look at the memory and the log of its host"
        )
    return (
        f"{same}weights are the same ({proof}); so arithmetic differs{_worst(batch, update)}: "
        "compare model.dtype, kernels and versions of vLLM and transformers, or raise gap.mean and "
        "gap.max if this is the precision you want"
    )


def gaps_by_engine(
    batch: Sequence[ScoredGroup], update: UpdateMetrics
) -> Mapping[int, Sequence[float]]:
    """Largest gap of each group that has tokens of the newest version, by engine."""
    newest = max((c.version for one in batch for c in one.group.completions), default=0)
    gaps: dict[int, list[float]] = defaultdict(list)
    for one, gap in zip(batch, update.group_gaps, strict=False):
        if any(completion.version == newest for completion in one.group.completions):
            gaps[one.group.engine].append(gap)
    return gaps


def _worst(batch: Sequence[ScoredGroup], update: UpdateMetrics) -> str:
    if not update.group_gaps:
        return ""
    gap, place = max((gap, place) for place, gap in enumerate(update.group_gaps))
    group = batch[place].group
    return (
        f", most on prompt {group.request.prompt.id} with {len(group.image_hashes)} image(s) on "
        f"engine {group.engine} ({gap:.1g})"
    )


def _listed(engines: Sequence[int]) -> str:
    return ", ".join(f"engine {engine}" for engine in sorted(engines))
