"""What a run writes down, as it happens: the files of the run directory.

    config.toml        as resolved          metrics.jsonl   a line a step
    evals.jsonl        a line an evaluation syncs.jsonl     a receipt a sync
    completions/step_N.parquet              every completion with scores, advantage, version

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

from medrl.actors.types import Receipt, ScoredGroup, UpdateMetrics
from medrl.cluster.metrics import step_metrics

Record = Mapping[str, Any]


class Listener(Protocol):
    """Hears of every step and evaluation: the display, W&B, Prometheus."""

    def on_step(self, metrics: Record) -> None: ...

    def on_eval(self, evaluation: Record) -> None: ...


class Journal:
    """Writes the run directory and tells the listeners."""

    def __init__(self, run_dir: Path, listeners: Sequence[Listener] = ()) -> None:
        self.run_dir = run_dir
        self._listeners = listeners
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
    ) -> None:
        """Write a finished step: metrics, receipt and completions."""
        now = time.monotonic()
        seconds = {
            "step": now - self._step_began,
            "idle_learner": self._idle_learner,
            "idle_rollout": idle_rollout,
        }
        metrics = step_metrics(step, batch, update, receipt, seconds)
        metrics["memory.driver_bytes"] = psutil.Process().memory_info().rss
        self._write_completions(step, batch, update)
        if receipt:
            self.record_sync(receipt)
        self._append("metrics.jsonl", metrics)
        for listener in self._listeners:
            listener.on_step(metrics)
        self._step_began = now

    def record_sync(self, receipt: Receipt) -> None:
        self._append("syncs.jsonl", asdict(receipt))

    def record_eval(self, evaluation: Record) -> None:
        """Write an evaluation; one of the same step and split replaces the earlier one."""
        path = self.run_dir / "evals.jsonl"
        keys = ("step", "split")
        kept = [e for e in read_lines(path) if any(e[k] != evaluation[k] for k in keys)]
        _replace_lines(path, [*kept, evaluation])
        for listener in self._listeners:
            listener.on_eval(evaluation)

    def rewind(self, step: int) -> None:
        """Take back what was written after `step`."""
        for name in ("metrics.jsonl", "syncs.jsonl", "evals.jsonl"):
            path = self.run_dir / name
            if (
                path.exists()
            ):  # also where no line goes: the last may be cut off, and be appended to
                kept = [line for line in read_lines(path) if line["step"] <= step]
                _replace_lines(path, kept)
        for file in self._completions.glob("step_*.parquet"):
            if int(file.stem.removeprefix("step_")) > step:
                file.unlink()

    def _append(self, name: str, record: Record) -> None:
        with (self.run_dir / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _write_completions(
        self, step: int, batch: Sequence[ScoredGroup], update: UpdateMetrics
    ) -> None:
        rows = [
            {
                "step": step,
                "draw": group.group.request.draw,
                "prompt_id": group.group.request.prompt.id,
                "prompt": group.group.request.text,
                "answer": group.group.request.prompt.answer,
                "options": list(group.group.request.prompt.options),
                "images": list(group.group.request.prompt.images),
                "image_hashes": list(group.group.image_hashes),
                "modality": group.group.request.prompt.modality,
                "question_type": group.group.request.prompt.question_type,
                "completion": completion.text,
                "token_ids": list(completion.token_ids),
                "logprobs": list(completion.logprobs),
                "finish_reason": completion.finish_reason,
                "scores": [{"name": k, "value": v} for k, v in score.components.items()],
                "reward": score.total,
                "outcome": score.outcome,
                "reason": score.reason,
                "advantage": advantage,
                "version": completion.version,
                "engine": group.group.engine,
            }
            for group, advantages in zip(batch, update.advantages, strict=True)
            for completion, score, advantage in zip(
                group.group.completions, group.scores, advantages, strict=True
            )
        ]
        table = pa.Table.from_pylist(rows, schema=COMPLETIONS)
        pq.write_table(table, self._completions / f"step_{step:06d}.parquet")


COMPLETIONS = pa.schema(
    [
        ("step", pa.int64()),
        ("draw", pa.int64()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
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
        ("reason", pa.string()),
        ("advantage", pa.float64()),
        ("version", pa.int64()),
        ("engine", pa.int64()),
    ]
)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; a last line cut off by a crash is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _replace_lines(path: Path, records: Sequence[Record]) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    aside.replace(path)
