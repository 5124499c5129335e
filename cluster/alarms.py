"""The alarms of a run: each is raised once when it begins and once when it ends.

The rules lie in `cluster.alarm_rules`, the gate on the log-prob gap in `cluster.gap`. What is kept
between steps is the last lines of metrics.jsonl, the first ones, and which alarms hold; a resumed
run reads all of it back from the run directory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from medrl.actors.types import Receipt, ScoredGroup, UpdateMetrics
from medrl.cluster.alarm_rules import RULES, Bounds
from medrl.cluster.gap import GapGate, gap_limits
from medrl.configs.schema import Config

Record = Mapping[str, Any]

FIRST = 5  # steps that later ones are compared with
QUIET = 5  # steps without its cause end an alarm: one that comes and goes is said once
GAP = "log-prob gap"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A line of alarms.jsonl."""

    step: int  # at which it was raised, or ended
    name: str
    event: Literal["began", "ended"]
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    since: int  # step
    last: int  # step its cause was last there


class Alarms:
    """What holds now, and the few steps it is judged by."""

    def __init__(
        self, bounds: Bounds, gate: GapGate, say: Callable[[str], None] = lambda text: None
    ) -> None:
        """`say`: shows a sentence to whoever watches the run."""
        self._bounds = bounds
        self._say = say
        self.gate = gate
        self._first: list[Record] = []
        self._recent: deque[Record] = deque(maxlen=max(rule.steps for rule in RULES))
        self._held: dict[str, _Held] = {}

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the alarms that hold."""
        return tuple(self._held)

    def look(self, metrics: Record) -> list[Alarm]:
        """What began or ended with this step, which is not a GRPO step (fine-tuning)."""
        self._keep(metrics)
        step = int(metrics["step"])
        alarms = list(self._changes(step, dict(self._causes())))
        for alarm in alarms:
            self._say(f"{'alarm' if alarm.event == 'began' else 'alarm over'}: {alarm.message}")
        return alarms

    def look_at_batch(
        self,
        metrics: Record,
        batch: Sequence[ScoredGroup],
        update: UpdateMetrics,
        receipt: Receipt | None,
    ) -> list[Alarm]:
        """As `look`, with the gap. `receipt`: of the version before this step's update."""
        self.gate.look(batch, update, receipt)
        return self.look(metrics)

    def conclude(self, metrics: Sequence[Record]) -> None:
        """Say what did nothing in a whole run. `metrics`: all its lines."""
        for rule in (rule for rule in RULES if rule.of_run):
            known = metrics and all(key in one for one in metrics for key in rule.needs)
            if known and (cause := rule.judge(metrics, metrics[:FIRST], self._bounds)):
                self._say(f"of the whole run: {rule.name}: {cause}")

    def resume(self, metrics: Sequence[Record], alarms: Sequence[Record]) -> None:
        """Go on from the lines of metrics.jsonl and alarms.jsonl."""
        self.gate.forget()
        self._first, self._held = list(metrics[:FIRST]), {}
        self._recent.clear()
        self._recent.extend(metrics)
        last = int(metrics[-1]["step"]) if metrics else 0
        for alarm in alarms:
            if alarm["event"] == "began":
                self._held[alarm["name"]] = _Held(since=int(alarm["step"]), last=last)
            else:
                self._held.pop(alarm["name"], None)

    def _keep(self, metrics: Record) -> None:
        if len(self._first) < FIRST:
            self._first.append(metrics)
        self._recent.append(metrics)

    def _causes(self) -> Iterator[tuple[str, str]]:
        """Name and sentence of each alarm whose cause is there."""
        recent = list(self._recent)
        for rule in RULES:
            steps = recent[-rule.steps :]
            known = all(key in one for one in steps for key in rule.needs)
            whole = known and len(steps) == rule.steps
            if whole and (cause := rule.judge(steps, self._first, self._bounds)):
                yield rule.name, f"since step {steps[0]['step']} {cause}"
        if self.gate.cause:
            yield GAP, f"at step {recent[-1]['step']} {self.gate.cause}"

    def _changes(self, step: int, causes: Mapping[str, str]) -> Iterator[Alarm]:
        for name, cause in causes.items():
            if name not in self._held:
                yield Alarm(step=step, name=name, event="began", message=f"{name}: {cause}")
            since = self._held[name].since if name in self._held else step
            self._held[name] = _Held(since=since, last=step)
        for name, held in list(self._held.items()):
            if step - held.last >= QUIET:
                del self._held[name]
                message = f"{name}: raised at step {held.since}, gone since step {held.last + 1}"
                yield Alarm(step=step, name=name, event="ended", message=message)


def make_alarms(
    config: Config, dtype: Literal["float32", "bfloat16"], say: Callable[[str], None]
) -> Alarms:
    """Of a run; `dtype` is what its weights are computed in. Raises `UserError`."""
    bounds = Bounds(
        completions=config.rollout.completions,
        max_tokens=config.rollout.max_tokens,
        staleness=config.rollout.staleness,
        max_replaced=config.rollout.max_replaced,
        max_failed_fraction=config.reward.max_failed_fraction,
        updates_per_batch=config.learner.updates_per_batch,
        importance_cap=config.learner.importance_cap,
    )
    return Alarms(bounds, GapGate(gap_limits(config.gap, dtype)), say)
