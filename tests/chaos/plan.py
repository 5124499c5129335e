"""Which fault at which moment: drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from faults import FAULTS, Fault, Phase

AT_ONCE = 0.25  # share of faults that come while the one before is being recovered from
LATEST_S = 12.0  # after it
WITHIN_S = 1.5  # of the step's end, the others


@dataclass(frozen=True, slots=True)
class Planned:
    """A fault, once `step` is done and `delay_s` later; step 0: after the fault before."""

    fault: Fault
    step: int
    delay_s: float


FULL: Mapping[Phase, Mapping[str, int]] = {
    "equal": {
        "engine actor killed": 6,
        "vLLM process killed": 6,
        "engine killed in a sync": 4,
        "learner rank killed": 7,
        "rank killed in a sync": 4,
        "everything killed": 3,
        "everything killed, a byte flipped": 1,
        "everything killed, a file cut": 1,
        "vLLM process hangs": 3,
        "learner rank hangs": 3,
        "Ctrl-C": 2,
        "SIGTERM": 2,
        "disk full": 2,
        "reward actor killed": 4,
    },
    "noise": {
        "engine actor killed": 5,
        "vLLM process killed": 5,
        "engine killed in a sync": 3,
        "learner rank killed": 5,
        "rank killed in a sync": 3,
        "everything killed": 2,
        "vLLM process hangs": 2,
        "reward actor killed": 3,
        "reward process killed": 6,
        **{fault.name: 3 for fault in FAULTS if fault.name.startswith("reward: ")},
    },
}
"""108 faults, 55 of them kills of engines, ranks and the driver."""

SHORT: Mapping[Phase, Mapping[str, int]] = {
    "equal": {
        "vLLM process killed": 1,
        "learner rank killed": 1,
        "reward actor killed": 1,
        "disk full": 1,
        "everything killed, a byte flipped": 1,
    },
    "noise": {
        "engine actor killed": 1,
        "reward process killed": 1,
        "reward: spin": 1,
        "reward: exit": 1,
        "reward: fork and die": 1,
    },
}


def fewer(counts: Mapping[Phase, Mapping[str, int]], total: int) -> dict[Phase, dict[str, int]]:
    """About `total` faults in the same proportions, of as many kinds as there is room for."""
    most = sum(sum(of.values()) for of in counts.values())
    share = min(1.0, total / most)
    return {
        phase: {name: int(count * share + 0.5) for name, count in of.items()}
        for phase, of in counts.items()
    }


def only(
    counts: Mapping[Phase, Mapping[str, int]], parts: Sequence[str]
) -> dict[Phase, dict[str, int]]:
    """One of each whose name holds any of `parts`, in each phase that has it."""
    return {
        phase: {name: 1 for name in of if any(part in name for part in parts)}
        for phase, of in counts.items()
    }


def plan(
    counts: Mapping[str, int], rng: random.Random, *, first: int, last: int
) -> Sequence[Planned]:
    """The faults in a random order, at moments spread over the steps from `first` to `last`."""
    by_name = {fault.name: fault for fault in FAULTS}
    order = [by_name[name] for name, count in counts.items() for _ in range(count)]
    rng.shuffle(order)
    planned: list[Planned] = []
    together = False
    for number, fault in enumerate(order):
        at = first + (number + rng.random()) / len(order) * (last - first)
        # Never three at once: four deaths without a step are a crash loop, and end the run.
        together = bool(planned) and not together and rng.random() < AT_ONCE
        if together:
            planned.append(Planned(fault, 0, rng.uniform(0.0, LATEST_S)))
        else:
            planned.append(Planned(fault, int(at), rng.uniform(0.0, WITHIN_S)))
    return planned
