"""When a run's numbers say that something is wrong: one small pure rule an alarm.

A rule sees the last few lines of metrics.jsonl and the run's first ones, and returns a sentence
(which numbers, what to do) while its alarm holds, else "". `cluster.alarms` asks them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pvariance
from typing import Any

Record = Mapping[str, Any]
Steps = Sequence[Record]  # metrics of consecutive steps, oldest first

ENTROPY_SHARE = 0.05  # of the first steps' entropy: a healthy run that solves its task ends above
SOLVED = 0.8  # mean accuracy: above, few answers differ because few are wrong
TREND = 0.05  # least change of a mean score that counts; below, prompts of one batch vary more
SURE = 3.0  # and in standard errors of the difference
TRUNCATED = 0.3  # share of completions: above, the cut decides what is rewarded
GROWTH = 1.5  # times the first steps' length
NEAR_LIMIT = 0.5  # share of rollout.max_tokens from which growth is running away
IMPROBABLE = 3.0  # nats a completion: equal completions are then no accident, exp(-3) a pair
FAILED = 0.05  # share of completions; or half of reward.max_failed_fraction, if that is less
IDLE = 0.3  # share of a step that engines wait: above, the learner is what a run waits for
LEAK_BYTES = 2**30  # growth of the driver, which holds ids and numbers only: 1 GiB is far too much
UNCORRECTED = 1e-5  # distance of the mean importance weight from 1: float32 rounding gives 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What of a run's config the rules compare with."""

    completions: int  # G
    max_tokens: int
    staleness: int
    max_replaced: int
    max_failed_fraction: float
    updates_per_batch: int
    importance_cap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """An alarm, and what its rule looks at."""

    name: str
    steps: int  # it is asked about so many steps, all of which have `needs`
    needs: tuple[str, ...]
    judge: Callable[[Steps, Steps, Bounds], str]  # (these steps, the run's first ones, bounds)
    of_run: bool = False  # asked about the whole run too, at its end and however short it was


def no_gradient(steps: Steps, first: Steps, bounds: Bounds) -> str:
    if any(one["zero_variance_groups"] < one["groups"] for one in steps):
        return ""
    return (
        f"in each of {len(steps)} steps all scores of every group were equal (mean reward "
        f"{_mean(steps, 'reward.mean'):.2f}), so nothing is learnt; take easier or harder prompts "
        "(data.min_pass_rate, data.max_pass_rate), and read RUN/completions"
    )


def entropy_collapse(steps: Steps, first: Steps, bounds: Bounds) -> str:
    then, now = _mean(first, "entropy"), _mean(steps, "entropy")
    accuracy = fmean(one.get("reward.accuracy", 0.0) for one in steps)
    if now > ENTROPY_SHARE * then or accuracy >= SOLVED:
        return ""
    return (
        f"entropy is {now:.2g} nats a token, it was {then:.2g} in the first steps, while accuracy "
        f"is {accuracy:.2f}: hardly anything else is tried any more; go back to an earlier "
        "checkpoint with a lower learner.learning_rate, a higher learner.clip_high or "
        "learner.kl_coefficient"
    )


def format_up_accuracy_down(steps: Steps, first: Steps, bounds: Bounds) -> str:
    forms, accuracies = _changes(steps, "reward.format"), _changes(steps, "reward.accuracy")
    if not (_grew(*forms) and _grew(*reversed(accuracies))):
        return ""
    return (
        f"format rose from {fmean(forms[0]):.2f} to {fmean(forms[1]):.2f} while accuracy fell from "
        f"{fmean(accuracies[0]):.2f} to {fmean(accuracies[1]):.2f} over {len(steps)} steps: the "
        "form is learnt instead of the answer; lower the weight of format in reward.terms"
    )


def length(steps: Steps, first: Steps, bounds: Bounds) -> str:
    completions = sum(one["groups"] for one in steps) * bounds.completions
    truncated = sum(one["truncated_completions"] for one in steps) / completions
    then, now = _mean(first, "tokens.per_completion"), _mean(steps, "tokens.per_completion")
    grew = now > GROWTH * then and now > NEAR_LIMIT * bounds.max_tokens
    if truncated < TRUNCATED and not grew:
        return ""
    return (
        f"completions have {now:.0f} tokens, {then:.0f} in the first steps, and {truncated:.0%} "
        f"are cut off at rollout.max_tokens ({bounds.max_tokens}); raise that, or set "
        "learner.mask_truncated or reward.overlong_tokens"
    )


def identical(steps: Steps, first: Steps, bounds: Bounds) -> str:
    same = sum(one["identical_groups"] for one in steps)
    groups = sum(one["groups"] for one in steps)
    nats = fmean(one["entropy"] * one["tokens.per_completion"] for one in steps)
    if same < groups and (2 * same < groups or nats < IMPROBABLE):
        return ""
    return (
        f"in {same} of {groups} groups of {len(steps)} steps all {bounds.completions} completions "
        f"are the same token for token, while a completion's entropy is {nats:.2g} nats; where "
        "that is much, sampling is broken (look at the engines' logs for top_k or a seed), else "
        "raise rollout.temperature or go back to an earlier checkpoint"
    )


def failures(steps: Steps, first: Steps, bounds: Bounds) -> str:
    failed = sum(one["failed_completions"] for one in steps)
    completions = sum(one["groups"] for one in steps) * bounds.completions
    if failed <= min(FAILED, bounds.max_failed_fraction / 2) * completions:
        return ""
    return (
        f"{failed} of {completions} completions of {len(steps)} steps could not be scored; above "
        f"{bounds.max_failed_fraction:.0%} of a step (reward.max_failed_fraction) the run stops; "
        "their outcome and reason are in RUN/completions"
    )


def staleness(steps: Steps, first: Steps, bounds: Bounds) -> str:
    """With a bound above 0 so many groups are in flight that the bound is often met. It is a sign
    of trouble where engines wait as well: then age buys no speed."""
    idle = fmean(one["seconds.idle_rollout"] / one["seconds.step"] for one in steps)
    if not bounds.staleness or idle < IDLE:
        return ""
    if any(one["staleness.max"] < bounds.staleness for one in steps):
        return ""
    return (
        f"for {len(steps)} steps completions were as old as rollout.staleness allows "
        f"({bounds.staleness}) while engines waited {idle:.0%} of the time: the learner is what "
        "the run waits for; lower rollout.staleness, or give placement.learners what "
        "placement.engines has too much"
    )


def memory(steps: Steps, first: Steps, bounds: Bounds) -> str:
    """Still growing: the least of each quarter is above that of the one before."""
    size = len(steps) // 4
    values = [int(one["memory.driver_bytes"]) for one in steps]
    least = [min(values[i * size : (i + 1) * size]) for i in range(4)]
    grown = least[-1] - max(one["memory.driver_bytes"] for one in first)
    if grown < LEAK_BYTES or least != sorted(set(least)):
        return ""
    return (
        f"the driver grew by {grown / 2**30:.1f} GiB since the first steps, to "
        f"{least[-1] / 2**30:.1f} GiB, and goes on by {(least[-1] - least[0]) / 2**20:.0f} MiB in "
        f"{len(steps)} steps; it holds no pixels or weights, so this is a leak: stop the run "
        "(Ctrl-C keeps a checkpoint), go on with --resume, and report it"
    )


def idle_correction(steps: Steps, first: Steps, bounds: Bounds) -> str:
    weight = max((abs(one["importance.mean"] - 1), one["importance.mean"]) for one in steps)
    if not bounds.importance_cap or weight[0] > UNCORRECTED:
        return ""
    todo = "compare versions in RUN/completions" if bounds.staleness else "set it to 0"
    return (
        f"learner.importance_cap is {bounds.importance_cap:g}, but the mean weight was within "
        f"{UNCORRECTED:g} of 1 in all of {len(steps)} steps (rollout.staleness is "
        f"{bounds.staleness}): it corrects nothing; {todo}"
    )


def idle_clip(steps: Steps, first: Steps, bounds: Bounds) -> str:
    if bounds.updates_per_batch == 1 or any(one["clip_fraction"] for one in steps):
        return ""
    return (
        f"not one token was clipped in {len(steps)} steps of {bounds.updates_per_batch} updates a "
        "batch: the updates are too small for learner.clip_low and learner.clip_high to matter; "
        "raise learner.learning_rate, or take fewer learner.updates_per_batch"
    )


def idle_filter(steps: Steps, first: Steps, bounds: Bounds) -> str:
    replaced = [one["replaced_groups"] for one in steps]
    if not bounds.max_replaced or 0 < sum(replaced) < bounds.max_replaced * len(steps):
        return ""
    if sum(replaced):
        return (
            f"dynamic sampling replaced as many groups as rollout.max_replaced allows "
            f"({bounds.max_replaced}) in each of {len(steps)} steps, and groups of equal scores "
            "are trained all the same; raise it, or take prompts of other difficulty"
        )
    return (
        f"dynamic sampling (rollout.max_replaced = {bounds.max_replaced}) kept every group of "
        f"{len(steps)} steps: no group's scores are all equal, so it can be set to 0"
    )


RULES = (
    Rule(
        name="no gradient",
        steps=3,
        needs=("zero_variance_groups", "groups", "reward.mean"),
        judge=no_gradient,
    ),
    Rule(name="entropy collapse", steps=10, needs=("entropy",), judge=entropy_collapse),
    Rule(
        name="format up, accuracy down",
        steps=20,
        needs=("reward.format", "reward.accuracy"),
        judge=format_up_accuracy_down,
    ),
    Rule(
        name="length",
        steps=5,
        needs=("truncated_completions", "groups", "tokens.per_completion"),
        judge=length,
    ),
    Rule(
        name="identical completions",
        steps=3,
        needs=("identical_groups", "groups", "entropy", "tokens.per_completion"),
        judge=identical,
    ),
    Rule(name="failures", steps=5, needs=("failed_completions", "groups"), judge=failures),
    Rule(
        name="staleness",
        steps=10,
        needs=("staleness.max", "seconds.idle_rollout", "seconds.step"),
        judge=staleness,
    ),
    Rule(name="memory", steps=40, needs=("memory.driver_bytes",), judge=memory),
    Rule(
        name="idle correction",
        steps=20,
        needs=("importance.mean",),
        judge=idle_correction,
        of_run=True,
    ),
    Rule(name="idle clip", steps=20, needs=("clip_fraction",), judge=idle_clip, of_run=True),
    Rule(name="idle filter", steps=20, needs=("replaced_groups",), judge=idle_filter, of_run=True),
)


def _mean(steps: Steps, key: str) -> float:
    return fmean(one[key] for one in steps)


def _changes(steps: Steps, key: str) -> tuple[list[float], list[float]]:
    """The first and the second half's values."""
    values = [float(one[key]) for one in steps]
    return values[: len(values) // 2], values[len(values) // 2 :]


def _grew(before: Sequence[float], after: Sequence[float]) -> bool:
    """By TREND, and surely so."""
    change = fmean(after) - fmean(before)
    error = math.sqrt(pvariance(before) / len(before) + pvariance(after) / len(after))
    return change > max(TREND, SURE * error)
