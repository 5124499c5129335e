"""What a run writes down, as it happens: the files of the run directory.

    config.toml        as resolved          metrics.jsonl   a line a step
    evals.jsonl        a line an evaluation syncs.jsonl     a receipt a sync
    alarms.jsonl       what began or ended  faults.jsonl    who left and came back, and why
    completions/step_N.parquet              every completion with scores, parsed answer, advantage
                                            (none: its group was replaced, not trained), version

Lines are flushed as they are written. Resuming from a checkpoint of step N takes back what was
written after it (`rewind`), so that steps stay contiguous.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from medrl.actors.pool import Outage
from medrl.actors.types import ImitationMetrics, Receipt, ScoredGroup, UpdateMetrics
from medrl.cluster.alarms import Alarm, Alarms
from medrl.cluster.metrics import step_metrics
from medrl.reports.lines import read_lines

Record = Mapping[str, Any]


class Listener(Protocol):
    """Hears of every step and evaluation: the display, W&B, Prometheus."""

    def on_step(self, metrics: Record) -> None: ...

    def on_eval(self, evaluation: Record) -> None: ...


class Journal:
    """Writes the run directory and tells the listeners."""

    def __init__(
        self, run_dir: Path, listeners: Sequence[Listener] = (), alarms: Alarms | None = None
    ) -> None:
        """`alarms`: None raises none."""
        self.run_dir = run_dir
        self._listeners = listeners
        self._alarms = alarms
        self._receipt: Receipt | None = None  # of the last sync
        self._completions = run_dir / "completions"
        self._completions.mkdir(parents=True, exist_ok=True)
        self._step_began = time.monotonic()
        self._idle_learner = 0.0

    def begin_step(self) -> None:
        """Start the clock of a step; `record_step` starts the next one's."""
        self._step_began = time.monotonic()

    def begin_learning(self) -> None:
        """The learner has its batch: the time up to now it was idle."""
        self._idle_learner = time.monotonic() - self._step_began

    def record_step(
        self,
        step: int,
        batch: Sequence[ScoredGroup],
        update: UpdateMetrics,
        receipt: Receipt | None,
        idle_rollout: float,
        replaced: Sequence[ScoredGroup] = (),
    ) -> None:
        """Write a finished step: metrics, receipt and completions, of `replaced` groups too."""
        now = time.monotonic()
        seconds = {
            "step": now - self._step_began,
            "idle_learner": self._idle_learner,
            "idle_rollout": idle_rollout,
        }
        metrics = step_metrics(step, batch, update, receipt, seconds, replaced)
        metrics["memory.driver_bytes"] = psutil.Process().memory_info().rss
        self._write_completions(step, batch, update, replaced)
        alarms: Sequence[Alarm] = ()
        if self._alarms:
            alarms = self._alarms.look_at_batch(metrics, batch, update, self._receipt)
        self._receipt = None  # a push that failed proves nothing
        if receipt:
            self.record_sync(receipt)
        self._write_step(metrics, alarms)
        self._step_began = now

    def conclude(self) -> None:
        """Say what of the run, all steps of which are done, did nothing."""
        if self._alarms:
            self._alarms.conclude(read_lines(self.run_dir / "metrics.jsonl"))

    def refuse_gap(self) -> None:
        """Raise `GapError` where the run must not go on with the last steps' log-prob gap."""
        if self._alarms:
            self._alarms.gate.refuse()

    def record_imitation(self, step: int, update: ImitationMetrics) -> None:
        """Write a finished step of supervised fine-tuning."""
        now = time.monotonic()
        metrics = {
            "step": step,
            "version": step,
            "loss": update.loss,
            "gradient_norm": update.gradient_norm,
            "learning_rate": update.learning_rate,
            "tokens.completion": update.tokens,
            "seconds.step": now - self._step_began,
            "seconds.learn": update.seconds,
            "memory.driver_bytes": psutil.Process().memory_info().rss,
        }
        self._write_step(metrics, self._alarms.look(metrics) if self._alarms else ())
        self._step_began = now

    def record_sync(self, receipt: Receipt) -> None:
        self._receipt = receipt
        self._append("syncs.jsonl", asdict(receipt))

    def record_outage(self, step: int, outage: Outage) -> None:
        """Write that a part left or came back. What was, was: going back to a step keeps it."""
        self._append("faults.jsonl", {"step": step, "time": time.time(), **asdict(outage)})

    def record_eval(self, evaluation: Record) -> None:
        """Write an evaluation; one of the same step and split replaces the earlier one."""
        path = self.run_dir / "evals.jsonl"
        keys = ("step", "split")
        kept = [e for e in read_lines(path) if any(e[k] != evaluation[k] for k in keys)]
        _replace_lines(path, [*kept, evaluation])
        for listener in self._listeners:
            listener.on_eval(evaluation)

    def has_eval(self, step: int) -> bool:
        """Whether an evaluation of `step` is written."""
        return any(line["step"] == step for line in read_lines(self.run_dir / "evals.jsonl"))

    def rewind(self, step: int) -> None:
        """Take back what was written after `step`."""
        for name in ("metrics.jsonl", "syncs.jsonl", "evals.jsonl", "alarms.jsonl"):
            path = self.run_dir / name
            if (
                path.exists()
            ):  # also where no line goes: the last may be cut off, and be appended to
                kept = [line for line in read_lines(path) if line["step"] <= step]
                _replace_lines(path, kept)
        for file in self._completions.glob("step_*.tmp"):
            file.unlink()
        for file in self._completions.glob("step_*.parquet"):
            if int(file.stem.removeprefix("step_")) > step:
                file.unlink()
        if self._alarms:
            written = (read_lines(self.run_dir / f"{name}.jsonl") for name in ("metrics", "alarms"))
            self._alarms.resume(*written)

    def _write_step(self, metrics: dict[str, Any], alarms: Sequence[Alarm]) -> None:
        if self._alarms:
            metrics["alarms"] = len(self._alarms.held)
        self._append("metrics.jsonl", metrics)
        for alarm in alarms:
            self._append("alarms.jsonl", asdict(alarm))
        for listener in self._listeners:
            listener.on_step(metrics)

    def _append(self, name: str, record: Record) -> None:
        with (self.run_dir / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _write_completions(
        self,
        step: int,
        batch: Sequence[ScoredGroup],
        update: UpdateMetrics,
        replaced: Sequence[ScoredGroup],
    ) -> None:
        trained = zip(batch, update.advantages, strict=True)
        untrained = ((group, [None] * len(group.scores)) for group in replaced)
        rows = [
            {
                "step": step,
                "draw": group.group.request.draw,
                "prompt_id": group.group.request.prompt.id,
                "prompt": group.group.request.text,
                "question": group.group.request.prompt.question,
                "source": group.group.request.prompt.source,
                "answer": group.group.request.prompt.answer,
                "options": group.group.request.prompt.options,
                "images": group.group.request.prompt.images,
                "image_hashes": group.group.image_hashes,
                "modality": group.group.request.prompt.modality,
                "question_type": group.group.request.prompt.question_type,
                "completion": completion.text,
                "token_ids": completion.token_ids,
                "logprobs": completion.logprobs,
                "finish_reason": completion.finish_reason,
                "scores": [{"name": k, "value": v} for k, v in score.components.items()],
                "reward": score.total,
                "outcome": score.outcome,
                "parsed": score.answer,
                "reason": score.reason,
                "advantage": advantage,
                "version": completion.version,
                "engine": group.group.engine,
            }
            for group, advantages in (*trained, *untrained)
            for completion, score, advantage in zip(
                group.group.completions, group.scores, advantages, strict=True
            )
        ]
        table = pa.Table.from_pylist(rows, schema=COMPLETIONS)
        path = self._completions / f"step_{step:06d}.parquet"
        aside = path.with_suffix(".tmp")  # half a Parquet file is none: nobody could read the run
        pq.write_table(table, aside)
        aside.replace(path)


COMPLETIONS = pa.schema(
    [
        ("step", pa.int64()),
        ("draw", pa.int64()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("question", pa.string()),
        ("source", pa.string()),
        ("answer", pa.string()),
        ("options", pa.list_(pa.string())),
        ("images", pa.list_(pa.string())),
        ("image_hashes", pa.list_(pa.string())),
        ("modality", pa.string()),
        ("question_type", pa.string()),
        ("completion", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
        ("scores", pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))),
        ("reward", pa.float64()),
        ("outcome", pa.string()),
        ("parsed", pa.string()),
        ("reason", pa.string()),
        ("advantage", pa.float64()),
        ("version", pa.int64()),
        ("engine", pa.int64()),
    ]
)


def _replace_lines(path: Path, records: Sequence[Record]) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    aside.replace(path)
