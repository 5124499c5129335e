"""What shows that a measured run did its work. Without that it is not reported.

A trainer whose gradients are zero, an engine that stops early and a sync that moves nothing are all
very fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


class Refused(Exception):
    """A measurement is not reported: its run did not do the work. Says what, and what was found."""


class Fact(Protocol):
    """Found out about a run, beside its time."""

    def check(self) -> None:
        """Raises `Refused`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """Norms of the gradients of each update."""

    whose: str
    norms: tuple[float, ...]

    def check(self) -> None:
        if not self.norms or not all(0 < norm < math.inf for norm in self.norms):
            raise Refused(f"{self.whose}: gradient norms {self.norms}: nothing was learnt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of the completions, the end token left out."""

    whose: str
    asked: int
    found: tuple[int, ...]

    def check(self) -> None:
        short = sum(length < self.asked for length in self.found)
        if short or not self.found:
            raise Refused(
                f"{self.whose}: {short} of {len(self.found)} completions are shorter than the "
                f"{self.asked} tokens asked, the shortest {min(self.found, default=0)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What a sync of weights brought: digests of tensors, by name, before and after."""

    whose: str
    bytes: int
    before: Mapping[str, str]
    after: Mapping[str, str]

    def check(self) -> None:
        if self.bytes <= 0 or not self.after:
            raise Refused(f"{self.whose}: the sync moved {self.bytes} bytes")
        if same := [name for name in self.after if self.after[name] == self.before.get(name)]:
            raise Refused(
                f"{self.whose}: the sync left {len(same)} of {len(self.after)} tensors as they "
                f"were, {same[0]} the first"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """How much of something was to be done, and was."""

    what: str
    asked: int
    done: int

    def check(self) -> None:
        if self.done != self.asked or not self.asked:
            raise Refused(f"{self.done} {self.what}, asked for {self.asked}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Equal:
    """A value that both sides must agree on, such as the loss on the same completions."""

    what: str
    ours: float
    other: float
    within: float

    def check(self) -> None:
        if not abs(self.ours - self.other) <= self.within:  # also where one is not a number
            raise Refused(
                f"{self.what}: {self.ours!r} here and {self.other!r} there, more than "
                f"{self.within:g} apart: the two did not do the same work"
            )
