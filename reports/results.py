"""Finished runs and their held-out numbers, as tables and pictures need them.

An experiment's folder holds experiment.toml and runs/<label>/, each with a result.json once it is
wholly done. Plain run directories are read as well, by their config.toml and newest evaluation.
"""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from medrl.configs.errors import UserError
from medrl.configs.experiment import flat, load_experiment
from medrl.reports.evaluations import newest_evaluation, read_json
from medrl.reports.lines import read_lines

Kind = Literal["all", "modality", "question_type"]
Train = Literal["none", "sft", "grpo"]

KINDS: tuple[Kind, Kind] = ("modality", "question_type")
TRAINS: tuple[Train, ...] = ("none", "sft", "grpo")
MODES = ("think-before", "think-after", "no-think")  # a difference is a later less an earlier one


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Held-out numbers of one target. Shares are in [0, 1]; None: not measured."""

    n: int
    accuracy: float  # strict
    correct: int | None = None
    low: float | None = None  # 95 % interval of `accuracy`
    high: float | None = None
    lenient: float | None = None
    format: float | None = None
    chance: float | None = None
    tokens_per_completion: float | None = None
    truncated: float | None = None
    blind: float | None = None  # accuracy with the images blanked


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run: what was trained, how, on what, and what its evaluation found."""

    label: str  # of its folder; unique among the results shown together
    method: str  # as shown: "GRPO no-think"
    train: Train
    mode: str
    source: str  # the only modality or question type trained on; "": all data, or no training
    source_kind: Literal["", "modality", "question_type"]
    seed: int
    steps: int
    seconds: float
    evaluation: Mapping[str, Any]  # as result.json has it
    folder: Path
    setup: str = ""  # all else of a plain run's config; an experiment's method has one

    @cached_property
    def targets(self) -> Mapping[tuple[Kind, str], Numbers]:
        """Numbers by kind and name of target, in the evaluation's order; ("all", "all") first."""
        return _targets(self.evaluation)

    def by(self, kind: Kind) -> Mapping[str, Numbers]:
        return {name: numbers for (k, name), numbers in self.targets.items() if k == kind}

    @property
    def overall(self) -> Numbers:
        """Over all held-out questions."""
        return self.targets["all", "all"]

    @property
    def predictions(self) -> Path:
        """The evaluation's completions, a line each; there may be no such file."""
        beside = self.folder / "predictions.jsonl"
        named = self.evaluation.get("predictions")
        return self.folder / "evals" / Path(named).name if isinstance(named, str) else beside

    @property
    def order(self) -> tuple[int, int, str]:
        """Sorts methods: no training, SFT, GRPO; within them by mode."""
        mode = MODES.index(self.mode) if self.mode in MODES else len(MODES)
        return TRAINS.index(self.train), mode, self.method


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """A run that an experiment has or will have."""

    label: str
    method: str
    source: str
    source_kind: str
    seed: int


def methods_of(results: Sequence[Result]) -> list[str]:
    """Names of the methods, in the order they are shown."""
    return list(dict.fromkeys(result.method for result in sorted(results, key=lambda r: r.order)))


def read_plan(folder: Path, results: Sequence[Result]) -> tuple[PlannedRun, ...]:
    """All runs of an experiment, done or not; () where its file does not say.

    Where it names no sources they are the training data's, and taken to be those of the held-out
    data, as `results` have them.
    """
    path = folder / "experiment.toml"
    if not path.is_file():
        return ()
    try:
        experiment = load_experiment(path)
    except UserError:
        return ()  # of an older version: the runs there are can be shown all the same
    kind, only = experiment.settings.sources, experiment.settings.only
    if kind == "all":
        sources: Sequence[str] = ("",)
    else:
        sources = only or sorted({name for result in results for name in result.by(kind)})
    return tuple(
        PlannedRun(
            label=training.label,
            method=training.method.name,
            source=training.source,
            source_kind=kind if training.source else "",
            seed=training.seed,
        )
        for training in experiment.trainings(sources)
    )


def read_results(*paths: Path) -> tuple[Result, ...]:
    """The finished runs of experiment folders and run directories. Raises `UserError`.

    An experiment that has finished no run yet gives none. Labels come out unique; run directories
    of one method, source and seed become methods of their own, for nothing says that they are
    repetitions.
    """
    results: list[Result] = []
    problems: list[str] = []
    for path in dict.fromkeys(paths):
        try:
            if is_experiment(path):
                done = sorted(path.glob("runs/*/result.json"))
                results += [_finished(file.parent) for file in done]
            else:
                results.append(_from_run(path))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return _told_apart(_labelled(results))


def is_experiment(path: Path) -> bool:
    return (path / "experiment.toml").is_file() or any(path.glob("runs/*/result.json"))


def _finished(folder: Path) -> Result:
    path = folder / "result.json"
    found = read_json(path, dict)
    wanted = {
        field.name: found.get(field.name)
        for field in fields(Result)
        if field.name not in ("label", "folder", "setup")
    }
    missing = [name for name, value in wanted.items() if value is None]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; delete it and run that part again")
    if wanted["train"] not in TRAINS or wanted["source_kind"] not in ("", *KINDS):
        raise UserError(
            f"{path}: train {wanted['train']!r} of source_kind {wanted['source_kind']!r}; needs "
            f"one of {', '.join(TRAINS)} and one of '', {', '.join(KINDS)}"
        )
    return _checked(Result(label=folder.name, folder=folder, **wanted), path)


def _from_run(folder: Path) -> Result:
    """A run directory as a result, by its newest evaluation."""
    if (folder / "result.json").is_file():
        return _finished(folder)
    path = folder / "config.toml"
    if not path.is_file():
        raise UserError(
            f"{folder}: neither an experiment (experiment.toml and runs/) nor a run directory "
            "(config.toml and evals.jsonl)"
        )
    try:
        config = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    run, data = config.get("run", {}), config.get("data", {})
    steps = read_lines(folder / "metrics.jsonl")
    train: Train = "none" if not steps else "sft" if run.get("method") == "sft" else "grpo"
    mode = str(data.get("mode", "no-think"))
    name = {"none": "zero-shot", "sft": "SFT", "grpo": "GRPO"}[train]
    starting = "" if steps else str(config.get("model", {}).get("path", ""))
    asked = {
        "mode": mode,
        "test": data.get("test", ""),
        "max_prompts": config.get("eval", {}).get("max_prompts", 0),
    }
    kind, source = _source(data) if train != "none" else ("", "")
    result = Result(
        label=folder.resolve().name,
        method=f"{name} {mode}",
        train=train,
        mode=mode,
        source=source,
        source_kind=kind,
        seed=int(run.get("seed", 0)),
        steps=len(steps),
        seconds=sum(step["seconds.step"] for step in steps),
        evaluation=newest_evaluation(folder, asked, starting),
        folder=folder,
        setup=_setup(config),
    )
    return _checked(result, folder)


def _setup(config: Mapping[str, Any]) -> str:
    """What runs must have in common to be repetitions of each other: all but name, place, seed and
    source (and the steps, where they follow from the source's epochs)."""
    keys = flat(config)
    by_epochs = keys.get("run.epochs") or keys.get("run.method") == "sft"
    free = {"run.name", "run.dir", "run.seed", "data.modalities", "data.question_types"}
    free |= {"run.steps"} if by_epochs else set()
    mine = {k: v for k, v in keys.items() if k not in free and not k.startswith("placement.")}
    return json.dumps(mine, sort_keys=True, default=str)


def _source(data: Mapping[str, Any]) -> tuple[Literal["", "modality", "question_type"], str]:
    modalities, types = data.get("modalities", ()), data.get("question_types", ())
    if len(modalities) == 1 and not types:
        return "modality", str(modalities[0])
    if len(types) == 1 and not modalities:
        return "question_type", str(types[0])
    return "", ""


def _checked(result: Result, path: Path) -> Result:
    try:
        result.targets  # noqa: B018 (reads the evaluation)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: its evaluation is not one: {error!r}") from None
    return result


def _targets(evaluation: Mapping[str, Any]) -> dict[tuple[Kind, str], Numbers]:
    if "breakdown" in evaluation:
        names = [field.name for field in fields(Numbers)]
        return {
            (row["kind"], row["name"]): Numbers(**{name: row.get(name) for name in names})
            for row in evaluation["breakdown"]
        }
    # Lines of evals.jsonl that older runs wrote have shares and counts only.
    found: dict[tuple[Kind, str], Numbers] = {
        ("all", "all"): Numbers(
            n=evaluation["n"],
            accuracy=evaluation["accuracy"],
            format=evaluation["format"],
            tokens_per_completion=evaluation.get("tokens.per_completion"),
        )
    }
    for kind in KINDS:
        counts = evaluation[f"n_by_{kind}"]
        for name, accuracy in evaluation[f"by_{kind}"].items():
            found[kind, name] = Numbers(n=counts[name], accuracy=accuracy)
    return found


def _labelled(results: Sequence[Result]) -> list[Result]:
    """Runs of one name in two folders are told apart by the folder."""
    counts = Counter(result.label for result in results)
    return [
        replace(result, label=str(result.folder)) if counts[result.label] > 1 else result
        for result in results
    ]


def _told_apart(results: Sequence[Result]) -> tuple[Result, ...]:
    """Only repetitions keep a method's bare name: they are averaged."""

    def cell(result: Result) -> tuple[str, str, str, int]:
        return result.method, result.source_kind, result.source, result.seed

    counts = Counter(map(cell, results))
    first: dict[tuple[str, str], str] = {}  # of each setup of a method: the label of a run
    for result in results:
        first.setdefault((result.method, result.setup), result.label)
    setups = Counter(method for method, _ in first)

    def name(result: Result) -> str:
        if counts[cell(result)] > 1:
            return f"{result.method} ({result.label})"
        if setups[result.method] > 1:
            return f"{result.method} (as {first[result.method, result.setup]})"
        return result.method

    return tuple(replace(result, method=name(result)) for result in results)
