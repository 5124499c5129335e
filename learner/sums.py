"""What an update measures, summed over its tokens and ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from medrl.learner.batch import RowBatch
from medrl.learner.objective import LossTerms


class Sums:
    """Sums over the trained tokens of a batch, for means over all ranks."""

    def __init__(self, version: int, groups: int, device: torch.device) -> None:
        """`groups`: P, of the batch."""
        self._version = version
        self._group_gaps = torch.zeros(groups, dtype=torch.float64, device=device)
        names = (
            *("loss", "tokens", "entropy", "kl", "clipped", "importance", "gap", "gap_tokens"),
            *("gap_max", "stale_gap", "stale_gap_max"),
        )
        self._values = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}

    def add(self, rows: RowBatch, terms: LossTerms, entropies: Tensor, old: Tensor) -> None:
        """`old` [B, S, C]: log-probs before the batch's first optimiser step."""
        values, trained = self._values, rows.trained
        gap = (old - rows.sampler).abs() * trained
        fresh = trained & (rows.versions == self._version)[..., None]
        values["loss"] += terms.loss.detach()
        values["tokens"] += trained.sum()
        values["entropy"] += (entropies.detach() * trained).sum()
        values["kl"] += terms.kl_sum
        values["clipped"] += terms.clipped_sum
        values["importance"] += terms.importance_sum
        values["gap"] += (gap * fresh).sum()
        values["gap_tokens"] += fresh.sum()
        values["gap_max"] = torch.maximum(values["gap_max"], (gap * fresh).max().double())
        values["stale_gap"] += gap.sum()
        values["stale_gap_max"] = torch.maximum(values["stale_gap_max"], gap.max().double())
        groups = torch.tensor([row.group for row in rows.rows], dtype=torch.long, device=gap.device)
        worst = (gap * fresh).flatten(1).amax(1).double()[: len(groups)]
        self._group_gaps.scatter_reduce_(0, groups, worst, "amax")

    def over_ranks(self, reduce: Callable[[Tensor, str], Tensor]) -> dict[str, float]:
        """The gap is over tokens sampled from this very version, where there are any: only there
        must it vanish. Else it is over all."""
        values: dict[str, float] = {}
        for how in ("sum", "max"):
            names = [name for name in self._values if name.endswith("_max") == (how == "max")]
            reduced = reduce(torch.stack([self._values[name] for name in names]), how)
            values |= zip(names, reduced.tolist(), strict=True)
        stale_tokens = values["tokens"] - values["gap_tokens"]
        values["drift"] = (values["stale_gap"] - values["gap"]) / max(stale_tokens, 1)
        values["fresh_tokens"] = values["gap_tokens"]
        if not values["gap_tokens"]:
            values["gap"], values["gap_tokens"] = values["stale_gap"], values["tokens"]
            values["gap_max"] = values["stale_gap_max"]
        return values

    def group_gaps(self, reduce: Callable[[Tensor, str], Tensor]) -> tuple[float, ...]:
        """[P] largest gap of each group's tokens of this version; 0 where there are none."""
        return tuple(reduce(self._group_gaps, "max").tolist())
