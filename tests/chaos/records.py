"""What became of each fault, read from the run's own faults.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stage import Incarnation

NOTICED_WITHIN_S = 150.0  # longer than any deadline of the soak's config, on a slow machine too
IN_A_SYNC = (  # what an engine or rank was asked when it died
    "sync:",
    "(pause)",
    "(join a transfer)",
    "(receive weights)",
    "(sample the canary)",
    "(resume)",
    "(address)",
    "(weights)",
    "(opening a transfer)",
    "(sending weights)",
    "(log-probs)",
)


@dataclass(slots=True, kw_only=True)
class Recorded:
    """A fault that was injected."""

    number: int
    name: str
    who: str
    is_kill: bool
    phase: str
    time: float
    step: int  # the last that was done
    hit: str
    out: Sequence[str] = ()  # who was out of service then
    up: float | None = None  # when the run was seen to go on, for faults that faults.jsonl lacks
    outcome: str = ""
    seconds: float | None = None  # from the fault to the end of the outage
    served_after_s: float | None = None  # from the run's noticing it: what it says itself
    cause: str = ""
    in_a_sync: bool = False


@dataclass(slots=True)
class Outage:
    """From leaving to coming back, or to the end of the incarnation."""

    who: str
    left: float
    cause: str
    returned: float | None
    seconds: float
    until: float
    taken: int = 0  # faults that account for it


def outages(
    lines: Sequence[Mapping[str, Any]], incarnations: Sequence[Incarnation]
) -> list[Outage]:
    """Of all parts, in the order of their leaving."""
    found: list[Outage] = []
    for life in incarnations:
        ended = life.ended or float("inf")
        open_ones: dict[str, list[Outage]] = {}
        for line in lines:
            if not life.began <= line["time"] < ended:
                continue
            who = line["who"]
            if line["event"] == "left":
                outage = Outage(who, line["time"], line["cause"], None, 0.0, ended)
                open_ones.setdefault(who, []).append(outage)
                found.append(outage)
            elif line["event"] in ("returned", "given up"):
                for outage in open_ones.pop(who, []):
                    outage.until = line["time"]
                    if line["event"] == "returned":
                        outage.returned, outage.seconds = line["time"], line["seconds"]
    return sorted(found, key=lambda it: it.left)


def settle(
    records: Sequence[Recorded],
    lines: Sequence[Mapping[str, Any]],
    incarnations: Sequence[Incarnation],
) -> list[Outage]:
    """Say of each record what became of it; returns the outages that no fault accounts for."""
    every = outages(lines, incarnations)
    for record in records:
        if not record.hit:
            record.outcome = "nothing there"
        elif record.who in ("engine", "learner"):
            _settle_outage(record, every, incarnations)
        else:
            _settle_by_step(record, incarnations)
            _account_for_rewards(record, every)
    return [outage for outage in every if not outage.taken]


def _settle_outage(
    record: Recorded, every: Sequence[Outage], incarnations: Sequence[Incarnation]
) -> None:
    ended = _end_of(record.time, incarnations)
    might = [
        it
        for it in every
        if it.who.startswith(record.who)
        and it.until > record.time
        and it.left < min(record.time + NOTICED_WITHIN_S, ended)
    ]
    fresh = [it for it in might if not it.taken and it.left >= record.time]
    outage = next(iter(fresh or might), None)
    if outage is None:
        last = incarnations[-1]
        late = ended == (last.ended or float("inf")) and last.how == "done"
        close = ended - record.time < NOTICED_WITHIN_S
        record.outcome = ("at the end" if late else "overtaken") if close else "not noticed"
        return
    outage.taken += 1
    record.cause = outage.cause
    record.in_a_sync = any(part in outage.cause for part in IN_A_SYNC)
    if outage.returned:
        record.outcome = "recovered"
        record.seconds = outage.returned - record.time
        record.served_after_s = outage.seconds
    else:
        record.outcome = "overtaken" if outage.until == ended else "given up"


def _settle_by_step(record: Recorded, incarnations: Sequence[Incarnation]) -> None:
    """Driver, rewards, disk: the run went on with a step after it."""
    if record.up is not None:
        record.outcome, record.seconds = "recovered", record.up - record.time
    elif incarnations[-1].how == "done":
        record.outcome = "at the end"
    else:
        record.outcome = "the run did not go on"


def _account_for_rewards(record: Recorded, every: Sequence[Outage]) -> None:
    """Their outage, where there is one, is the fault's; but a step after it says more."""
    mine = (
        it
        for it in every
        if record.who == "reward" and it.who == "rewards" and not it.taken
        if record.time <= it.left < record.time + NOTICED_WITHIN_S
    )
    if outage := next(mine, None):
        outage.taken += 1


def _end_of(time: float, incarnations: Sequence[Incarnation]) -> float:
    for life in incarnations:
        ended = life.ended or float("inf")
        if life.began <= time < ended:
            return ended
    return time
