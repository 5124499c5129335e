"""A file of experiments: many runs that differ in method, source and seed, and nothing else.

    [experiment]
    name = "cross_modality"
    sources = "modality"              # one training for each modality of the data

    [[experiment.methods]]
    name = "GRPO think-before"        # as tables and plots call it
    train = "grpo"                    # "sft", or "none": the starting model
    data.mode = "think-before"        # any key of a run may differ
    rollout.max_tokens = 48

All other sections are a run's (`configs.schema`), the same for all methods.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from medrl.configs.check import contradictions
from medrl.configs.errors import UserError
from medrl.configs.loader import config_of, expand_paths, read_tree, validated
from medrl.configs.schema import Config, Section

SourceKind = Literal["modality", "question_type", "all"]

SHARED = (
    "model.path",
    "model.dtype",
    "data.images",
    "data.max_pixels",
    "rollout.max_model_len",
    "rollout.memory_fraction",
    "rollout.cpu_cache_gib",
    "rollout.timeout_s",
)
"""Keys an engine is started with, beside all of placement: the same in all methods, for the engines
stay up from run to run."""


COMPARED = ("data.format", "data.test", "eval.max_prompts")
"""Keys that say what is asked at the end: the same in all methods, else their numbers say nothing
of each other."""


class MethodConfig(Section):
    name: str = Field(min_length=1)
    """As tables and plots call it."""
    train: Literal["grpo", "sft", "none"]
    """none: the starting model as it is."""


class ExperimentConfig(Section):
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The experiment's folder is run.dir/NAME."""
    sources: SourceKind = "all"
    """Train on each modality, or each question type, by itself; all: on everything at once."""
    only: tuple[str, ...] = ()
    """Of the sources, only these; empty: all there are in the training data."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """run.seed; every training is made once for each."""
    keep_models: bool = False
    """Keep each run's exported model."""
    methods: tuple[MethodConfig, ...] = Field(min_length=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One run of an experiment: a method, trained on a source, with a seed."""

    label: str  # its folder in EXPERIMENT/runs
    method: MethodConfig
    source: str  # "" where there is only one
    seed: int
    config: Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A checked experiment file."""

    settings: ExperimentConfig
    tree: Mapping[str, Any]  # all of the file, overrides applied
    configs: Mapping[str, Config]  # by method: a run of it, but for source and seed

    @property
    def folder(self) -> Path:
        return Path(self.any_config.run.dir) / self.settings.name

    @property
    def any_config(self) -> Config:
        """For what all methods share."""
        return next(iter(self.configs.values()))

    def trainings(self, sources: Sequence[str]) -> list[Training]:
        """All runs: those of the starting model first, for engines hold it when they start."""
        made = []
        for seed in self.settings.seeds:
            for method in self.settings.methods:
                trained = method.train != "none"
                for source in sources if trained else [""]:
                    if trained or seed == self.settings.seeds[0]:  # greedy: no seed changes it
                        made.append(self._training(method, source, seed))
        return sorted(made, key=lambda training: training.method.train != "none")

    def _training(self, method: MethodConfig, source: str, seed: int) -> Training:
        config = self.configs[method.name]
        label = "-".join([slug(method.name), *([slug(source)] if source else []), f"s{seed}"])
        run = {"name": label, "dir": str(self.folder / "runs"), "seed": seed}
        run |= {"method": "sft" if method.train == "sft" else "grpo"}
        data = {}
        if source:
            key = "modalities" if self.settings.sources == "modality" else "question_types"
            data[key] = (source,)
        update = {
            "run": config.run.model_copy(update=run),
            "data": config.data.model_copy(update=data),
        }
        config = config.model_copy(update=update)
        return Training(label=label, method=method, source=source, seed=seed, config=config)


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment in the file at `path`. Raises `UserError` with the problems of all methods."""
    tree = read_tree(path, overrides)
    section = tree.get("experiment")
    if not isinstance(section, dict) or not isinstance(section.get("methods"), list):
        raise UserError(
            f"{path}: needs a section [experiment] with [[experiment.methods]]; for a single run "
            "use medrl train"
        )
    keys = MethodConfig.model_fields.keys()
    plain = [{key: m[key] for key in keys if key in m} for m in section["methods"]]
    settings = validated(ExperimentConfig, {**section, "methods": plain})
    problems: list[str] = []
    configs: dict[str, Config] = {}
    for method, entry in zip(settings.methods, section["methods"], strict=True):
        if method.name in configs:
            problems.append(f"experiment.methods: {method.name!r} stands there twice")
        own = {key: value for key, value in entry.items() if key not in keys}
        merged = _merged({key: value for key, value in tree.items() if key != "experiment"}, own)
        merged.setdefault("run", {}).setdefault("name", settings.name)
        expand_paths(merged)
        try:
            configs[method.name] = config = config_of(merged)
            problems += [f"{method.name}: {problem}" for problem in contradictions(config)]
        except UserError as error:
            problems += [f"{method.name}: {problem}" for problem in error.problems]
    if not problems:
        problems = _unshared(configs) + _ambiguous(settings)
    if problems:
        raise UserError(*problems)
    return Experiment(settings=settings, tree=tree, configs=configs)


def slug(name: str) -> str:
    """`name` as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_").lower() or "x"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, table by table."""
    result = dict(copy.deepcopy(base))
    for key, value in over.items():
        below = result.get(key)
        both = isinstance(below, dict) and isinstance(value, Mapping)
        result[key] = _merged(below, value) if both and below is not None else value
    return result


def _unshared(configs: Mapping[str, Config]) -> list[str]:
    """Sentences for keys that may not differ between methods."""
    trees = {name: flat(config.model_dump(mode="json")) for name, config in configs.items()}
    (first, expected), *others = trees.items()
    engines, questions = "engines stay up from run to run", "only equal questions are comparable"
    reasons = dict.fromkeys(COMPARED, questions) | {
        key: engines for key in expected if key in SHARED or key.startswith("placement.")
    }
    return [
        f"{name}: {key} = {tree[key]!r}, but {first} has {expected[key]!r}; {reason}, so all "
        "methods share it"
        for name, tree in others
        for key, reason in reasons.items()
        if tree[key] != expected[key]
    ]


def _ambiguous(settings: ExperimentConfig) -> list[str]:
    names: dict[str, str] = {}
    problems = []
    for method in settings.methods:
        other = names.setdefault(slug(method.name), method.name)
        if other != method.name:
            problems.append(
                f"experiment.methods: {other!r} and {method.name!r} would share a folder; choose "
                "names that differ in letters or digits"
            )
    if len(set(settings.seeds)) != len(settings.seeds):
        problems.append(f"experiment.seeds: got {list(settings.seeds)}, needs different ones")
    return problems
