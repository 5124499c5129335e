"""Every error a person can meet, in one tree. All pickle, for they cross Ray.

    MedrlError
    ├── UserError            the input is wrong: one line a problem, exit status 2
    ├── EngineError          an engine failed, or broke the engine protocol
    ├── LearnerError         a learner rank failed
    ├── RewardError          failed completions above the limit: the reward itself is broken
    ├── WeightSyncError      a sync did not arrive, or arrived wrong
    ├── GapError             engines and learner compute different log-probs
    ├── PlacementError       the cluster cannot hold the run
    └── CheckpointError      a checkpoint is broken, or of another model

A message says what happened, what was found, and what to do. `ValueError` is for a caller's mistake
inside the code, `assert` for our own.
"""

from __future__ import annotations

from typing import TypeVar

E = TypeVar("E", bound="MedrlError")


class MedrlError(Exception):
    """Base of all errors here. Catch it at a process's boundary only."""

    died = False
    """Whether the process that was asked is gone, or does not answer: then another one, or the same
    started anew, may do what this one did not. Else a repetition would fail as well."""


class UserError(MedrlError):
    """The user's input is wrong. `problems` holds one sentence each; all are reported at once."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)  # args are what pickle rebuilds from
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


class EngineError(MedrlError):
    """An engine failed, or broke the engine protocol."""


class LearnerError(MedrlError):
    """A learner rank failed."""

    certain = False
    """Of a death: whether a rank's own code raised it, rather than a process or a connection that
    broke. The same twice in a row is then no accident."""

    half_way = False
    """Of a refusal: whether some of a batch's optimiser steps were made, so that the weights are of
    no version."""


class RewardError(MedrlError):
    """More completions failed to be scored than `reward.max_failed_fraction` allows."""


class WeightSyncError(MedrlError):
    """A sync did not arrive in time, or arrived wrong. Names the phase and the peer or tensor."""


class GapError(MedrlError):
    """The log-probs of engines and learner differ by more than `gap.mean` or `gap.max` allows."""


class PlacementError(MedrlError):
    """The cluster cannot hold the run: says what is missing."""


class CheckpointError(MedrlError):
    """A checkpoint is broken, or was made by another model."""


def as_death(error: E) -> E:
    """Mark an error as one of a process that died or hangs; it stays so across Ray."""
    error.died = True
    return error
