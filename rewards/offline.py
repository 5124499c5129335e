"""Score a file of completions: JSON lines in, the same lines with scores out, in order."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medrl.actors.types import LETTERS, Prompt, Score
from medrl.configs.errors import UserError
from medrl.rewards.accuracy import option_of
from medrl.rewards.compose import PlainTerm
from medrl.rewards.modes import MODES, get_mode
from medrl.rewards.policies import get_policy
from medrl.rewards.pool import RewardPool


@dataclass(frozen=True, slots=True)
class _Row:
    line: dict[str, Any]  # as it was read
    prompt: Prompt
    completion: str
    mode: str


def score_file(
    source: Path,
    out: Path,
    *,
    mode: str = "no-think",
    policy: str = "strict",
    rewards: Sequence[str] = ("format", "accuracy"),
    processes: int = 2,
    timeout_s: float = 5.0,
) -> dict[str, Any]:
    """Score each line's completion; `mode` is for lines that name none. Returns a summary:
    {"n", "outcomes": {outcome: count}, "scores": {reward: mean over the lines that it scored}}.

    `out` is written aside and renamed: it is whole, or it is as it was. Raises UserError with
    every problem of the file, before anything is written.
    """
    get_mode(mode)
    get_policy(policy)
    _refuse_bad_out(out)
    out = out.resolve()  # or the rename would replace a link, /dev/stdout for one
    rows = _read(source, mode)
    terms = [PlainTerm(use) for use in rewards]
    scores: list[Score | None] = [None] * len(rows)
    for name in sorted({row.mode for row in rows}):
        places = [place for place, row in enumerate(rows) if row.mode == name]
        with RewardPool(terms, name, processes, timeout_s, policy=policy) as pool:
            pairs = [(rows[place].prompt, rows[place].completion) for place in places]
            for place, score in zip(places, pool.score_pairs(pairs), strict=True):
                scores[place] = score
    whole = [score for score in scores if score is not None]
    write_lines(out, [_scored(row.line, score) for row, score in zip(rows, whole, strict=True)])
    return summary(whole)


def summary(scores: Sequence[Score]) -> dict[str, Any]:
    """{"n", "outcomes": {outcome: count}, "scores": {reward: mean over those that it scored}}"""
    names = dict.fromkeys(name for score in scores for name in score.components)
    means = {}
    for name in names:
        values = [score.components[name] for score in scores if name in score.components]
        means[name] = sum(values) / len(values)
    outcomes = dict(Counter(score.outcome for score in scores))
    return {"n": len(scores), "outcomes": outcomes, "scores": means}


def _scored(line: dict[str, Any], score: Score) -> dict[str, Any]:
    kept = {key: line[key] for key in line if key not in ("scores", "outcome", "reason")}
    said = {"scores": dict(score.components), "outcome": score.outcome}
    return kept | said | ({"reason": score.reason} if score.reason else {})


def write_lines(out: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON lines aside, then rename. Raises `UserError` where that cannot be done."""
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            for line in lines:
                file.write(_encoded(line) + b"\n")
        aside.replace(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def _encoded(line: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(line, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can carry
        return json.dumps(line).encode("ascii")


def _refuse_bad_out(out: Path) -> None:
    if out.is_dir():
        raise UserError(f"{out}: is a folder, needs the name of a file to write")
    if out.exists() and not out.is_file():  # the rename would put a file in its place
        raise UserError(f"{out}: is not an ordinary file, and would be replaced; name a file")
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent} to write it in")


def _read(source: Path, mode: str) -> list[_Row]:
    """Read and check all lines. Raises UserError with every problem."""
    try:
        lines = source.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from None
    rows, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(_object(line), f"line {number}", mode))
        except UserError as error:
            problems += [f"{source}, line {number}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(*problems)
    if not rows:
        raise UserError(f"{source}: is empty, needs a JSON object a line")
    return rows


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"column {error.colno}: broken JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # a number of too many digits is a ValueError
        raise UserError(f"broken JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"needs a JSON object, got {_kind(value)}")
    return value


def _refuse_constant(name: str) -> None:
    raise UserError(f"broken JSON: {name} is not a JSON number")


def _row(line: dict[str, Any], place: str, mode: str) -> _Row:
    """Check one line's keys. Raises UserError with all that is wrong with it."""
    problems = [
        f"key {key!r} is missing" for key in ("id", "completion", "answer") if key not in line
    ]
    for key, kinds in (("id", (str, int)), ("completion", str), ("answer", str), ("mode", str)):
        if key in line and (not isinstance(line[key], kinds) or isinstance(line[key], bool)):
            problems.append(f"{key!r} needs to be a string, got {_kind(line[key])}")
    options = line.get("options", [])
    if not isinstance(options, list) or not all(isinstance(text, str) for text in options):
        problems.append(f"'options' needs to be a list of strings, got {json.dumps(options)[:60]}")
    elif "options" in line and not 2 <= len(options) <= len(LETTERS):
        problems.append(f"{len(options)} option(s), needs 2 to {len(LETTERS)} (or no 'options')")
    named = line.get("mode", mode)
    if isinstance(named, str) and named not in (*MODES, mode):  # no line has a module imported
        problems.append(
            f"unknown mode {named!r}: choose one of {', '.join(MODES)}; one of your own is named "
            "by --mode"
        )
    if not problems:
        answer = _gold(line["answer"], options)
        if answer:
            prompt = Prompt(
                id=str(line["id"]),
                question=str(line.get("question", "")),
                options=tuple(options),
                answer=answer,
                images=(),
                modality="",
                question_type="",
                source=place,
            )
            return _Row(line, prompt, line["completion"], named)
        among = f" among the options {json.dumps(options, ensure_ascii=False)}" if options else ""
        problems.append(f"answer {line['answer']!r} is not{among or ' an answer: it is empty'}")
    raise UserError(*problems)


def _gold(answer: str, options: Sequence[str]) -> str:
    """Return the gold letter (a lone letter is a letter, even where an option is "A"), or text."""
    if not options:
        return answer.strip()
    letter = answer.strip().upper()
    if len(letter) == 1 and letter in LETTERS[: len(options)]:
        return letter
    return option_of(answer, options)


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else kinds.get(type(value), "a number")
