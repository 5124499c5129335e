"""DeepSpeed's files of a checkpoint: read as data only, written so that ranks fail together.

DeepSpeed reads them as pickles that may call anything. Here they may make tensors, numbers, texts
and the few classes that DeepSpeed is known to put there; a file that names anything else is refused
before a word of it is executed. And where DeepSpeed's writing raises, on a full disk say, the rank
leaves the others in a collective for good: here what went wrong is kept until all can hear of it.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from medrl.configs.errors import CheckpointError


class StateFiles:
    """Stands for an engine's `checkpoint_engine`, which it asks for all else."""

    def __init__(self, inner: Any, classes: Sequence[type]) -> None:
        """`classes`: what files may make besides torch's own. They only hold values."""
        self._inner = inner
        self._classes: list[Any] = list(classes)
        self.problem = ""  # the first of this rank since `problem` was last set

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Keep what goes wrong in the block, where a rank must not leave the others."""
        try:
            yield
        except Exception as error:
            self.problem = self.problem or f"{type(error).__name__}: {error}"

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        with self.noting():
            Path(path).mkdir(parents=True, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str | Path) -> None:
        with self.noting():
            torch.save(state_dict, path)

    def load(self, path: str | Path, map_location: Any = None) -> Any:
        """Raises `CheckpointError` where a file holds more than data."""
        try:
            with torch.serialization.safe_globals(self._classes):
                return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL (\S+)", str(error))
            what = f"names {named[1]}" if named else "is no file of torch's"
            raise CheckpointError(
                f"{path} {what}: it is not data only, and nothing of it was executed; use a "
                "checkpoint that this program has written"
            ) from error
