"""The control of the demo: the same run with each group's rewards dealt to random completions.

    python bench/shuffled_rewards.py configs/demo.toml run.name=shuffled

Everything is as in `medrl train`, the amount and spread of the rewards included; only which
completion gets which is random. What still rises in held-out accuracy does not come from GRPO.
Evaluations, of one completion a prompt, are untouched.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace

from medrl.actors.types import Group, ScoredGroup
from medrl.cluster import cli, start
from medrl.rewards.actor import RayScorer


class ShufflingScorer(RayScorer):
    """Scores as ever, then permutes the scores within the group."""

    async def score_group(self, group: Group) -> ScoredGroup:
        scored = await super().score_group(group)
        scores = list(scored.scores)
        random.Random(group.request.seed).shuffle(scores)
        return replace(scored, scores=tuple(scores))


if __name__ == "__main__":
    start.RayScorer = ShufflingScorer  # type: ignore[attr-defined]
    sys.argv[1:1] = ["train"]
    cli.main()
