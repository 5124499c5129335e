"""The last layer: from hidden states to log-probs, without the logits of all tokens at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_CHUNK_LOGITS = 2**26
"""Logits held at a time: 256 MiB in float32. A vocabulary of 150,000 is 447 tokens a chunk."""


class LogProbHead(nn.Linear):
    """A language model's head that never holds the logits of all tokens at once."""

    forbidden: Tensor  # [K] ids an engine never samples: no probability, as there

    def forward(self, hidden: Tensor, *labels: Tensor) -> Any:
        """`hidden` [M, D]; with `labels` (targets [M], temperatures [M]): log-probs [M] and
        entropies [M] in nats, float32. Without: the logits."""
        if not labels:
            return super().forward(hidden)
        targets, temperatures = labels
        size = max(1, _CHUNK_LOGITS // self.out_features)
        parts = [
            self._chunk(hidden[i : i + size], targets[i : i + size], temperatures[i : i + size])
            for i in range(0, len(hidden), size)
        ]
        logprobs, entropies = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _chunk(
        self, hidden: Tensor, targets: Tensor, temperatures: Tensor
    ) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            return self._score(hidden, targets, temperatures)
        scored: tuple[Tensor, Tensor] = checkpoint(
            self._score, hidden, targets, temperatures, use_reentrant=False
        )
        return scored

    def _score(
        self, hidden: Tensor, targets: Tensor, temperatures: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = super().forward(hidden).float() / temperatures[:, None]
        # Not -inf: the entropy multiplies it by a probability of 0.
        logits = logits.index_fill(-1, self.forbidden, torch.finfo(logits.dtype).min)
        normalizer = logits.logsumexp(-1)
        logprobs = logits.gather(-1, targets[:, None])[:, 0] - normalizer
        with torch.no_grad():
            entropies = normalizer - (logits * (logits - normalizer[:, None]).exp()).sum(-1)
        return logprobs, entropies
