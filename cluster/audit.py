"""Score the completions of a run's journal again, and compare with what was recorded.

Each line names the rule that was applied and the answer it read, so that any score can be followed
by hand; that the scores come out the same shows that the journal says all that they depend on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from medrl.actors.types import Prompt, Score
from medrl.cluster.preflight import reward_terms
from medrl.configs.errors import UserError
from medrl.configs.loader import load_config
from medrl.configs.schema import Config
from medrl.rewards.offline import score_file, summary, write_lines
from medrl.rewards.overlong import punished
from medrl.rewards.pool import RewardPool

Row = Mapping[str, Any]

_KEPT = ("step", "draw", "prompt_id", "completion", "answer", "options", "images", "version")
_UNSEEN = ("token_ids", "logprobs")  # heavy; only their number matters to a score


def score_any(
    source: Path, out: Path, *, mode: str | None, policy: str | None, rewards: str | None
) -> dict[str, Any]:
    """Score what `medrl score` is given: a run, or JSON lines. None: the default, or the run's own.

    `rewards`: names with commas between. Returns what `score_journal` or `score_file` does."""
    if not (source.is_dir() or source.suffix == ".parquet"):
        names = [name.strip() for name in (rewards or "format,accuracy").split(",")]
        return score_file(
            source,
            out,
            mode=mode or "no-think",
            policy=policy or "strict",
            rewards=[name for name in names if name],
        )
    if mode or policy or rewards:
        raise UserError(
            f"--mode, --policy, --rewards: {source} is of a run, whose config.toml says them; "
            "leave them out"
        )
    return score_journal(source, out)


def score_journal(source: Path, out: Path) -> dict[str, Any]:
    """Score RUN, RUN/completions or one of its files by RUN/config.toml; write a line each.

    Returns `offline.summary` with "differing": how many scores are not those recorded, "failed":
    how many failed then or now and cannot be compared, "example": a sentence about the first that
    differs. Raises `UserError`.
    """
    files, config = _files(source), _config_of(source)
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"{out}: needs to be a file in a folder that exists")
    reward = config.reward
    lines: list[dict[str, Any]] = []
    scores: list[Score] = []
    with RewardPool(
        reward_terms(config),
        config.data.mode,
        reward.processes,
        reward.timeout_s,
        policy=reward.policy,
    ) as pool:
        for file in files:
            rows = list(_rows(file))
            again = pool.score_pairs([(_prompt(row), row["completion"]) for row in rows])
            again = [_whole(score, row, config) for score, row in zip(again, rows, strict=True)]
            lines += [_line(row, score, config) for row, score in zip(rows, again, strict=True)]
            scores += again
    write_lines(out, lines)
    differing = [line for line in lines if line["same"] is False]
    return summary(scores) | {
        "differing": len(differing),
        "failed": sum(line["same"] is None for line in lines),
        "example": _told(differing[0]) if differing else "",
    }


def _files(source: Path) -> Sequence[Path]:
    if not source.is_dir():
        files = [source] if source.is_file() else []
    else:
        folder = source / "completions" if (source / "completions").is_dir() else source
        files = sorted(folder.glob("step_*.parquet"))
    if not files:
        raise UserError(f"{source}: has no completions/step_N.parquet; name a run's folder")
    return files


def _config_of(source: Path) -> Config:
    """Of the run that `source` is, or is a part of."""
    for folder in [source, *source.absolute().parents][:3]:
        if (path := folder / "config.toml").is_file():
            return load_config(path)
    raise UserError(f"{source}: no config.toml beside completions, which says mode and rewards")


def _rows(file: Path) -> Iterator[Row]:
    """Of one step; "tokens" for their number."""
    try:
        table = pq.read_table(file)
        lengths = pc.list_value_length(table.column("token_ids"))
        table = table.drop_columns(list(_UNSEEN)).append_column("tokens", lengths)
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise UserError(f"{file}: is no file of completions: {error}") from None
    yield from table.to_pylist()


def _prompt(row: Row) -> Prompt:
    return Prompt(
        id=row["prompt_id"],
        question=row.get("question") or "",  # a run's files before these were kept have none
        options=tuple(row["options"]),
        answer=row["answer"],
        images=tuple(row["images"]),
        modality=row["modality"],
        question_type=row["question_type"],
        source=row.get("source") or "",
    )


def _whole(score: Score, row: Row, config: Config) -> Score:
    """With what is added after the rewards, which see no tokens."""
    margin, longest = config.reward.overlong_tokens, config.rollout.max_tokens
    if not margin:
        return score
    return punished(score, row["tokens"], row["finish_reason"], longest, margin)


def _line(row: Row, score: Score, config: Config) -> dict[str, Any]:
    """`same`: None where one of both failed, which may be chance."""
    recorded = {one["name"]: one["value"] for one in row["scores"]}
    failed = score.failed or row["outcome"] in ("error", "timeout")
    same = (
        recorded == dict(score.components)
        and score.outcome == row["outcome"]
        and math.isclose(score.total, row["reward"], abs_tol=1e-9)
    )
    return {
        "id": row["prompt_id"],
        **{key: row[key] for key in _KEPT if key != "prompt_id"},
        "mode": config.data.mode,
        "policy": config.reward.policy,
        "scores": dict(score.components),
        "reward": score.total,
        "outcome": score.outcome,
        "parsed": score.answer,
        "reason": score.reason,
        "recorded": {"scores": recorded, "reward": row["reward"], "outcome": row["outcome"]},
        "same": None if failed else same,
    }


def _told(line: Row) -> str:
    recorded = line["recorded"]
    return (
        f"step {line['step']}, prompt {line['id']}: recorded {recorded['scores']} "
        f"({recorded['outcome']}), now {line['scores']} ({line['outcome']})"
    )
