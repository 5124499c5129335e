"""Which failure of a call to all ranks is told."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from medrl.actors.actor import death
from medrl.actors.heartbeat import Hangs
from medrl.configs.errors import LearnerError, MedrlError, as_death


def failure_to_tell(what: str, tasks: Sequence[asyncio.Task[Any]]) -> MedrlError:
    """The failure to tell: a death before a mistake, a mistake before what either caused.

    What no rank raised on purpose counts as a death: a peer that is gone or hangs shows as a broken
    collective, and after any of them the ranks may be out of step."""
    failures = [
        (rank, error)
        for rank, task in enumerate(tasks)
        if task.done() and (error := task.exception()) is not None
    ]
    for rank, error in failures:
        if isinstance(error, RayActorError):
            text = f"learner rank {rank} died ({what}): {death(error)}"
            return _with_cause(as_death(LearnerError(text)), error)
        if isinstance(error, Hangs):
            return as_death(LearnerError(f"learner rank {rank} ({what}) {error}"))
    for _, error in failures:
        if isinstance(cause := _cause(error), MedrlError):
            return _with_cause(cause, error)
    # A broken collective is a RuntimeError. What is none is a rank's own, and broke the others'.
    own = [(rank, error) for rank, error in failures if not isinstance(_cause(error), RuntimeError)]
    rank, error = (own or failures)[0]
    cause = _cause(error)
    told = LearnerError(f"learner rank {rank} failed ({what}): {type(cause).__name__}: {cause}")
    told.certain = bool(own)
    return _with_cause(as_death(told), error)


def _cause(error: BaseException) -> BaseException:
    """What was raised on the rank; Ray wraps it."""
    return error.cause if isinstance(error, RayTaskError) else error


def _with_cause(error: MedrlError, cause: BaseException) -> MedrlError:
    error.__cause__ = cause
    return error
