"""From scored groups to the numbers of an evaluation: pure functions, no engine.

Every question has one greedy completion. `accuracy` is strict (the answer stands in the asked tags)
and `lenient` reads an answer wherever it stands; the intervals are `reports.intervals`'. Blind is
the same prompt with its images blanked: what the model owes to seeing is the difference.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

from medrl.actors.types import ScoredGroup
from medrl.configs.errors import RewardError
from medrl.reports.intervals import paired_difference, wilson

Kind = Literal["all", "modality", "question_type"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Questions of one kind, counted together. Shares are in [0, 1]."""

    kind: Kind
    name: str  # of the modality or question type; "all"
    n: int  # questions
    correct: int
    accuracy: float  # strict
    low: float  # 95 % interval of `accuracy`
    high: float
    lenient: float
    format: float
    chance: float | None  # expected of guessing, of those that have options; None: all are open
    tokens_per_completion: float
    truncated: float  # share of completions cut off at rollout.max_tokens
    blind_n: int  # questions that were also asked with their images blanked
    blind: float | None  # strict accuracy of those, blanked; None: there are none


def summarize(
    step: int, split: str, groups: Sequence[ScoredGroup], blind: Sequence[ScoredGroup] = ()
) -> dict[str, Any]:
    """A line of evals.jsonl. A blind group is the twin of the one with the same draw.

    A completion whose reward failed is an error here: a number from the rest would not be the
    split's. Raises `RewardError`.
    """
    _refuse_failed([*groups, *blind])
    twins = {group.group.request.draw: group for group in blind}
    modalities = _rows("modality", groups, twins)
    question_types = _rows("question_type", groups, twins)
    overall = _row("all", "all", groups, twins)
    return {
        "step": step,
        "split": split,
        "n": overall.n,
        "accuracy": overall.accuracy,
        "low": overall.low,
        "high": overall.high,
        "lenient": overall.lenient,
        "format": overall.format,
        "chance": overall.chance,
        "macro_by_modality": fmean(row.accuracy for row in modalities),
        "macro_by_question_type": fmean(row.accuracy for row in question_types),
        "by_modality": {row.name: row.accuracy for row in modalities},
        "by_question_type": {row.name: row.accuracy for row in question_types},
        "n_by_modality": {row.name: row.n for row in modalities},
        "n_by_question_type": {row.name: row.n for row in question_types},
        "tokens.per_completion": overall.tokens_per_completion,
        "truncated": overall.truncated,
        "blind": overall.blind,
        "blind_difference": _difference(groups, twins),
        "breakdown": [asdict(row) for row in (overall, *modalities, *question_types)],
    }


def _refuse_failed(groups: Sequence[ScoredGroup]) -> None:
    failed = [group for group in groups if group.scores[0].failed]
    if failed:
        score = failed[0].scores[0]
        raise RewardError(
            f"evaluation: {len(failed)} of {len(groups)} completions could not be scored, e.g. "
            f"prompt {failed[0].group.request.prompt.id}: {score.outcome}, {score.reason}"
        )


def _rows(
    kind: Literal["modality", "question_type"],
    groups: Sequence[ScoredGroup],
    twins: Mapping[int, ScoredGroup],
) -> list[Row]:
    named: dict[str, list[ScoredGroup]] = defaultdict(list)
    for group in groups:
        prompt = group.group.request.prompt
        named[prompt.modality if kind == "modality" else prompt.question_type].append(group)
    return [_row(kind, name, named[name], twins) for name in sorted(named)]


def _row(
    kind: Kind, name: str, groups: Sequence[ScoredGroup], twins: Mapping[int, ScoredGroup]
) -> Row:
    right = [_right(group) for group in groups]
    low, high = wilson(sum(right), len(groups))
    completions = [group.group.completions[0] for group in groups]
    options = [len(group.group.request.prompt.options) for group in groups]
    choices = [1 / number for number in options if number]
    blind = [twin for _, twin in _pairs(groups, twins)]
    return Row(
        kind=kind,
        name=name,
        n=len(groups),
        correct=sum(right),
        accuracy=fmean(right),
        low=low,
        high=high,
        lenient=fmean(_component(group, "lenient") for group in groups),
        format=fmean(_component(group, "format") for group in groups),
        chance=fmean(choices) if choices else None,
        tokens_per_completion=fmean(len(one.token_ids) for one in completions),
        truncated=fmean(one.finish_reason == "length" for one in completions),
        blind_n=len(blind),
        blind=fmean(map(_right, blind)) if blind else None,
    )


def _difference(
    groups: Sequence[ScoredGroup], twins: Mapping[int, ScoredGroup]
) -> dict[str, float] | None:
    """Strict accuracy seeing less blind, of the questions asked both ways; None: there are none."""
    pairs = [(_right(group), _right(twin)) for group, twin in _pairs(groups, twins)]
    if not pairs:
        return None
    seeing, blind = (fmean(side) for side in zip(*pairs, strict=True))
    low, high = paired_difference(
        both=pairs.count((True, True)),
        first=pairs.count((True, False)),
        second=pairs.count((False, True)),
        neither=pairs.count((False, False)),
    )
    return {
        "n": len(pairs),
        "seeing": seeing,
        "difference": seeing - blind,
        "low": low,
        "high": high,
    }


def _pairs(
    groups: Iterable[ScoredGroup], twins: Mapping[int, ScoredGroup]
) -> list[tuple[ScoredGroup, ScoredGroup]]:
    draws = ((group, group.group.request.draw) for group in groups)
    return [(group, twins[draw]) for group, draw in draws if draw in twins]


def _right(group: ScoredGroup) -> bool:
    """Strict accuracy knows no half points."""
    return _component(group, "accuracy") == 1


def _component(group: ScoredGroup, name: str) -> float:
    return group.scores[0].components[name]
