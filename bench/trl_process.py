"""The other side of the step benchmark: TRL's trainer, kept in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medrl.actors.chat import forbidden_token_ids
from medrl.bench.facts import Refused
from medrl.configs.schema import Config
from medrl.data.load import load_prompts
from medrl.rewards.modes import get_mode


class TrlProcess:
    """Speaks with bench/trl_trainer.py. Raises `Refused` where that ended."""

    def __init__(self, config: Config, folder: Path) -> None:
        """Model, data, lengths and G are those of `config`; what TRL writes goes into `folder`."""
        from transformers import AutoTokenizer

        loaded = load_prompts(config.data, "train")
        self._text = get_mode(config.data.mode).render
        self._root = loaded.image_root
        self._prompts = {prompt.id: prompt for prompt in loaded.prompts}
        self._asked = {
            "model": config.model.path,
            "folder": str(folder),
            "prompts": config.rollout.prompts,
            "completions": config.rollout.completions,
            "tokens": config.rollout.max_tokens,
            "forbidden": forbidden_token_ids(AutoTokenizer.from_pretrained(config.model.path)),
        }
        self._process: subprocess.Popen[str]

    @contextmanager
    def running(self) -> Iterator[None]:
        """For the block."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "medrl.bench.trl_trainer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            yield
        finally:
            self._process.communicate()  # it ends with its input

    def loss(
        self, prompt_ids: list[str], token_ids: list[list[int]], rewards: list[float]
    ) -> dict[str, float]:
        """Loss and norm of the gradient for given completions, G for each prompt in order."""
        self._say(
            mode="loss",
            rows=self._rows(prompt_ids),
            token_ids=token_ids,
            rewards=rewards,
            checkpointing=False,
        )
        return self._hear()

    def begin(self, *, checkpointing: bool) -> None:
        """Load; from then on it makes steps. `checkpointing`: activations are computed twice."""
        self._say(mode="steps", rows=self._rows([*self._prompts]), checkpointing=checkpointing)
        self._hear()

    def step(self) -> dict[str, float]:
        """Its seconds, the norm of its gradient, tokens of the shortest completion."""
        self._write({})
        made = self._hear()
        self._hear()  # ready for the next
        return made

    def _rows(self, prompt_ids: list[str]) -> list[dict[str, str]]:
        prompts = [self._prompts[one] for one in prompt_ids]
        return [
            {"text": self._text(it), "image": str(self._root.absolute() / it.images[0])}
            for it in prompts
        ]

    def _say(self, **more: Any) -> None:
        self._write(self._asked | more)

    def _write(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise Refused("TRL's trainer ended; give bench/trl_trainer.py its input to see why")
        heard: dict[str, Any] = json.loads(line)
        return heard
