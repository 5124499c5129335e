"""Read a TOML file and `section.key=value` overrides into a `Config`, or report every problem.

Strict: unknown keys, wrong types, values out of range, inf and nan are refused, each with its path
and, for a key, a "did you mean". Overrides are TOML too (`learner.learning_rate=2e-6`); a value
that is no TOML is a string, so paths need no quotes. Relative paths are relative to the working
directory, wherever the file lies; "~" is the home directory.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import tomli_w
from pydantic import BaseModel, ValidationError

from medrl.configs.check import contradictions
from medrl.configs.errors import UserError
from medrl.configs.schema import Config

T = TypeVar("T", bound=BaseModel)

PATHS = (
    ("run", "dir"),
    ("model", "path"),
    ("data", "train"),
    ("data", "test"),
    ("data", "images"),
    ("data", "pass_rates"),
)

NEEDS = {
    "string_pattern_mismatch": "only letters, digits, '.', '_' and '-', a letter or digit first",
    "string_too_short": "some text",
    "too_short": "at least one",
    "tuple_type": 'a list, e.g. ["a", "b"]',
    "model_type": "a section of keys",
    "int_type": "an integer",
    "string_type": "a string",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": 'a table, e.g. {ours = "theirs"}',
}
"""By pydantic's type of error, where its own words are of Python or JSON and not of TOML."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in the file at `path` with `overrides` applied.

    Raises `UserError` with all problems: first those of the keys, then, when every key is right,
    those of values that contradict each other.
    """
    config = config_of(read_tree(path, overrides))
    if problems := contradictions(config):
        raise UserError(*problems)
    return config


def read_tree(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The file's tables with `overrides` applied, paths expanded, unchecked. Raises `UserError`."""
    tree = _read(path)
    problems = [problem for text in overrides if (problem := _apply(tree, text))]
    if problems:
        raise UserError(*problems)
    expand_paths(tree)
    return tree


def config_of(tree: Mapping[str, Any]) -> Config:
    """The typed tree, its keys checked one by one, with what its algorithm sets beside section
    learner. Raises `UserError` with all problems."""
    return _rest_of_dapo(validated(Config, tree))


def validated(model: type[T], tree: Mapping[str, Any]) -> T:
    """`tree` as a `model`. Raises `UserError` with all problems."""
    # Through JSON, for there strict mode takes a list for a tuple and an integer for a float.
    try:
        return model.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise UserError(*_sentences(model, error.errors())) from None


def dump_config(config: Config) -> str:
    """TOML with every default written out; `load_config` reads it back."""
    return tomli_w.dumps(config.model_dump(mode="json"))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A half sentence: the nearest of `known`, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"


def _rest_of_dapo(config: Config) -> Config:
    """What DAPO (arXiv 2503.14476) is beside its loss, where the file does not say otherwise.

    At most as many groups are replaced as a step has. The paper's punishment begins 4,096 tokens
    before 20,480: a fifth."""
    if config.learner.algorithm != "dapo":
        return config
    rollout, reward = config.rollout, config.reward
    if "max_replaced" not in rollout.model_fields_set:
        rollout = rollout.model_copy(update={"max_replaced": rollout.prompts})
    if "overlong_tokens" not in reward.model_fields_set:
        reward = reward.model_copy(update={"overlong_tokens": max(1, rollout.max_tokens // 5)})
    return config.model_copy(update={"rollout": rollout, "reward": reward})


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise UserError(f"config file {path} is a folder; name a TOML file in it")
    if not path.exists():
        near = sorted(str(other) for other in path.parent.glob("*.toml")) if path.parent else []
        hint = f"; {path.parent}/ has: {', '.join(near)}" if near else ""
        raise UserError(f"config file {path} does not exist{hint}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows marks UTF-8
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def expand_paths(tree: dict[str, Any]) -> None:
    """A resumed run compares paths as text: `starter` and `starter/` are one."""
    for section, key in PATHS:
        keys = tree.get(section)
        if isinstance(keys, dict) and isinstance(text := keys.get(key), str):
            expanded = os.path.expanduser(text)
            keys[key] = expanded.rstrip("/") or expanded


def _apply(tree: dict[str, Any], override: str) -> str | None:
    """Write one override into the tree; a sentence where it is malformed."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        return f"override {override!r} is not of the form section.key=value"
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    node = tree
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            return f"override {override!r}: {key!r} is a value, not a section"
        node = child
    node[keys[-1]] = value
    return None


def _sentences(model: type[BaseModel], errors: Sequence[Mapping[str, Any]]) -> list[str]:
    """All problems; of a list that is wrong because of its items, the items' only."""
    paths = [error["loc"] for error in errors]
    return [
        _sentence(model, error)
        for error in errors
        if not any(p != error["loc"] and p[: len(error["loc"])] == error["loc"] for p in paths)
    ]


def _sentence(model: type[BaseModel], error: Mapping[str, Any]) -> str:
    """One problem of pydantic's as one line: path, what was found, what to do."""
    where = ".".join(str(part) for part in error["loc"])
    kind, got = error["type"], error["input"]
    if kind == "extra_forbidden":
        parent, key = error["loc"][:-1], str(error["loc"][-1])
        return f"{where}: unknown key; {did_you_mean(key, _known_keys(model, parent))}"
    if kind == "missing":
        what = "section" if len(error["loc"]) == 1 else "key"
        return f"{where}: this {what} is needed and missing"
    if kind == "finite_number":
        return f"{where}: got {got}, needs a finite number"
    message = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    needs = NEEDS.get(kind) or f"{message[0].lower()}{message[1:]}"
    return f"{where}: got {_shown(got)}, needs {needs}"


def _shown(value: object) -> str:
    text = json.dumps(value, default=str) if isinstance(value, (str, list, dict)) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _known_keys(model: type[BaseModel], parent: Sequence[str | int]) -> list[str]:
    """Field names of the section at `parent`, a path in the tree of `model`."""
    for part in parent:
        if isinstance(part, int):  # an index into a list of sections
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
