"""Put rewards together: resolve the terms of a config, and score a completion with all of them.

Built-in ones have plain names: `format`, `accuracy` and those of built_in.py. A user's is any
`function(completion: str, prompt: Prompt) -> float | Score` named by its import path, and takes its
term's options as keyword arguments. One that raises, or returns no finite number, fails its
completion: outcome "error", never a 0 that would look like a bad answer.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from medrl.actors.types import Outcome, Prompt, Score
from medrl.configs.errors import UserError
from medrl.rewards.built_in import BUILT_IN, make_judge
from medrl.rewards.modes import Mode, get_mode
from medrl.rewards.policies import get_policy

Reward = Callable[[str, Prompt], float | Score]
"""(completion, prompt) -> a finite number, or a Score whose total is taken."""

_LONGEST_REASON = 300  # characters


class Term(Protocol):
    """What is read of `configs.schema.RewardTerm`; a protocol, so that workers need no pydantic."""

    @property
    def use(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def options(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class PlainTerm:
    """A term that comes from no config."""

    use: str
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rewards:
    """Named, weighted rewards of one mode."""

    mode: Mode
    terms: tuple[tuple[str, float, Reward], ...]  # name, weight, function

    def score(
        self,
        prompt: Prompt,
        completion: str,
        begin: Callable[[int], None] = lambda number: None,
    ) -> Score:
        """Score one completion. Nothing a reward does is raised; nothing here stops one either.

        `begin`: hears the number of each term before it is asked."""
        components: dict[str, float] = {}
        outcome: Outcome = "ok"
        answer = ""
        reasons = []
        for number, (name, _, reward) in enumerate(self.terms):
            begin(number)
            try:
                result = reward(completion, prompt)
                value = _number(result)
            except BaseException as error:  # a user's sys.exit() too: this is the boundary
                return failure("error", f"{name}: {last_line(error)}")
            if isinstance(result, Score):
                if result.failed:
                    return failure(result.outcome, f"{name}: {result.reason}")
                if name == "accuracy":
                    outcome, answer = result.outcome, result.answer
                if result.reason:
                    reasons.append(f"{name}: {result.reason}")
            components[name] = value
        total = sum(weight * components[name] for name, weight, _ in self.terms)
        if not math.isfinite(total):
            return failure("error", f"the weighted sum of the components is {total}")
        reason = "; ".join(reasons)[:_LONGEST_REASON]
        answer = answer[:_LONGEST_REASON] if isinstance(answer, str) else ""  # a user's may be odd
        return Score(
            components=components, total=total, outcome=outcome, reason=reason, answer=answer
        )


def failure(outcome: Outcome, reason: str) -> Score:
    """Return the score of a completion whose reward failed."""
    return Score(components={}, total=0.0, outcome=outcome, reason=reason[:_LONGEST_REASON])


def name_of(use: str) -> str:
    """Of a term: `lesion_iou` of `my_lab.rewards:lesion_iou`."""
    return use.rpartition(":")[2]


def last_line(error: BaseException) -> str:
    """Return what a traceback ends with: "ZeroDivisionError: division by zero"."""
    try:
        text = str(error).strip()
    except Exception:  # the error is the user's, and so is its __str__
        text = "(its message cannot be shown)"
    return f"{type(error).__name__}: {text.splitlines()[-1]}" if text else type(error).__name__


def _number(value: object) -> float:
    if isinstance(value, Score):
        value = value.total
    if isinstance(value, str | bytes | bytearray) or not hasattr(value, "__float__"):
        raise TypeError(f"returned {type(value).__name__}, needs a number or a Score")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"returned {number}, needs a finite number")
    return number


def build_rewards(terms: Sequence[Term], mode: str, *, policy: str = "strict") -> Rewards:
    """Resolve the terms. Raises UserError with every problem there is."""
    problems: list[str] = []
    built: list[tuple[str, float, Reward]] = []
    chosen = get_mode(mode)
    get_policy(policy)
    for term in terms:
        name = name_of(term.use)
        try:
            built.append((name, term.weight, _resolve(term, chosen, policy)))
        except UserError as error:
            problems += error.problems
    names = [name_of(term.use) for term in terms]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            uses = ", ".join(term.use for term in terms if name_of(term.use) == name)
            problems.append(f"reward name {name!r} is used {names.count(name)} times: {uses}")
    if "mean" in names:  # `reward.mean` in metrics.jsonl is the weighted sum's
        problems.append("a reward cannot be called 'mean': rename the function")
    if not terms:
        problems.append("no rewards: name at least one")
    if problems:
        raise UserError(*problems)
    return Rewards(chosen, tuple(built))


def _resolve(term: Term, mode: Mode, policy: str) -> Reward:
    """Find what a term names. Raises UserError."""
    if term.use in ("format", "accuracy"):
        if term.options:
            raise UserError(f"reward {term.use}: takes no options; reward.policy chooses its rule")
        chosen = get_policy(policy)
        if term.use == "format":
            return lambda completion, prompt: chosen.form(mode, completion)
        return lambda completion, prompt: chosen.accuracy(mode, prompt, completion)
    if term.use in BUILT_IN:
        judge = make_judge(term.use, term.options)
        return lambda completion, prompt: judge(mode, prompt, completion)
    return _import(term.use, term.options)


def _import(path: str, options: Mapping[str, Any]) -> Reward:
    """Resolve "pkg.module:function". Raises UserError."""
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name.isidentifier()):
        raise UserError(
            f"unknown reward {path!r}: use format, accuracy, {', '.join(BUILT_IN)}, or an import "
            "path like my_lab.rewards:lesion_iou"
        )
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:  # whatever the user's module does while it loads
        raise UserError(
            f"reward {path}: {module_name} does not import: {last_line(error)}"
        ) from None
    try:
        reward = getattr(module, name)
    except AttributeError:
        raise UserError(f"reward {path}: module {module_name} has no {name}") from None
    if not callable(reward):
        raise UserError(f"reward {path}: is a {type(reward).__name__}, not callable")
    _check_signature(path, reward, options)
    return partial(reward, **options)


def _check_signature(path: str, reward: Callable[..., object], options: Mapping[str, Any]) -> None:
    want = "needs (completion: str, prompt: Prompt) -> float"
    if inspect.iscoroutinefunction(reward):
        raise UserError(f"reward {path}: is an async function; {want}")
    try:
        signature = inspect.signature(reward)
    except ValueError:  # some built-ins have none; the gold answers will tell
        return
    if list(signature.parameters)[:2] == ["prompt", "completion"]:
        raise UserError(f"reward {path}: takes (prompt, completion), swapped; {want}")
    try:
        signature.bind("", None, **options)
    except TypeError:
        given = f", and takes the options {', '.join(options)}" if options else ""
        raise UserError(f"reward {path}: its signature is {signature}; {want}{given}") from None
