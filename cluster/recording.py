"""What a run's journal says of its schedule: which group, of which version, in which order.

All of it stands in completions/step_N.parquet: the rows of a batch stand in its order, each with
its draw (which says the prompt and the random streams) and the version that sampled it; those
without an advantage are of groups that were replaced. A push waits for running requests, so a group
is of one version. RUN/start.json says what the model was, since config.toml only names a folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medrl.actors.types import Score
from medrl.cluster.manifest import Manifest, manifest_of, manifest_type, other_than
from medrl.configs.errors import UserError
from medrl.reports.lines import read_lines

START = "start.json"
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")

_COLUMNS = ("draw", "prompt_id", "prompt", "version", "advantage", "outcome", "reason")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedGroup:
    """A group as the journal has it, less what was sampled."""

    draw: int
    prompt_id: str
    text: str
    version: int  # of the weights it was sampled from
    trained: bool  # else it was replaced
    failed: Mapping[int, Score]  # by place in the group: those whose reward failed


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedStep:
    """A batch, and what was replaced in filling it; both in their order."""

    metrics: Mapping[str, Any]  # its line
    groups: Sequence[RecordedGroup]

    @property
    def step(self) -> int:
        return int(self.metrics["step"])

    @property
    def batch(self) -> Sequence[int]:
        """Draws."""
        return [group.draw for group in self.groups if group.trained]

    @property
    def replaced(self) -> Sequence[int]:
        """Draws."""
        return [group.draw for group in self.groups if not group.trained]


def record_start(run_dir: Path, model: str) -> None:
    """Write down what the starting model is; a name on the hub says it itself. Blocks."""
    folder = Path(model)
    if folder.is_dir():
        files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)})
        record = manifest_type.dump_json(manifest_of(folder, files), indent=1)
        (run_dir / START).write_bytes(record)


def changed_start(run_dir: Path, model: str) -> str:
    """How the folder `model` differs from what the run started from; "": not, or nobody knows.
    Reads all bytes of it."""
    path, folder = run_dir / START, Path(model)
    if not path.is_file() or not folder.is_dir():
        return ""
    try:
        record: Manifest = manifest_type.validate_json(path.read_bytes())
    except ValueError:
        return f"{path} cannot be read"
    difference = other_than(folder, record)
    return f"model.path: {folder}: {difference}" if difference else ""


def read_recording(run_dir: Path, steps: int = 0) -> Sequence[RecordedStep]:
    """The schedule of the first `steps` steps; 0: of all. Raises `UserError`."""
    lines = read_lines(run_dir / "metrics.jsonl")
    if not lines:
        raise UserError(f"{run_dir}: its metrics.jsonl has no steps, so there is nothing to repeat")
    if [line["step"] for line in lines] != list(range(1, len(lines) + 1)):
        raise UserError(f"{run_dir}: steps are missing in metrics.jsonl, or stand there twice")
    if steps > len(lines):
        raise UserError(f"--steps: got {steps}, but {run_dir} has {len(lines)}")
    recorded = [_read_step(run_dir, line) for line in lines[: steps or None]]
    _refuse_impossible(run_dir, recorded)
    return recorded


def completions_of(run_dir: Path, step: int) -> Path:
    """The file of a step's completions."""
    return run_dir / "completions" / f"step_{step:06d}.parquet"


def _read_step(run_dir: Path, metrics: Mapping[str, Any]) -> RecordedStep:
    path = completions_of(run_dir, metrics["step"])
    try:
        rows = pq.read_table(path, columns=list(_COLUMNS)).to_pylist()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: without it nobody knows what was trained") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: is no file of completions: {error}") from None
    if not rows or set(rows[0]) != set(_COLUMNS):
        raise UserError(f"{path}: is no file of completions: needs {', '.join(_COLUMNS)}")
    groups = [_group(path, list(of_draw)) for _, of_draw in groupby(rows, lambda row: row["draw"])]
    return RecordedStep(metrics=metrics, groups=groups)


def _group(path: Path, rows: Sequence[Mapping[str, Any]]) -> RecordedGroup:
    first = rows[0]
    if len({row["version"] for row in rows}) > 1:
        raise UserError(f"{path}: draw {first['draw']} is of more than one version")
    return RecordedGroup(
        draw=first["draw"],
        prompt_id=first["prompt_id"],
        text=first["prompt"],
        version=first["version"],
        trained=first["advantage"] is not None,
        failed={
            place: Score(components={}, total=0.0, outcome=row["outcome"], reason=row["reason"])
            for place, row in enumerate(rows)
            if row["outcome"] in ("error", "timeout")
        },
    )


def _refuse_impossible(run_dir: Path, steps: Sequence[RecordedStep]) -> None:
    """What no run can have done would be waited for without end."""
    seen: dict[int, int] = {}
    for step in steps:
        for group in step.groups:
            where = f"{run_dir}: step {step.step}, draw {group.draw}"
            if not 0 <= group.version < step.step:
                raise UserError(f"{where}: sampled from version {group.version}, which comes later")
            if group.draw in seen:
                raise UserError(f"{where}: stands in step {seen[group.draw]} as well")
            seen[group.draw] = step.step
