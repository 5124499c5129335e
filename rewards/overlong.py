"""DAPO's soft overlong punishment, in tokens (arXiv 2503.14476, equation 13). Pure functions.

Rewards see text only, so this is added where groups are scored, after them.
"""

from __future__ import annotations

from dataclasses import replace

from medrl.actors.types import Score, ScoredGroup


def overlong(tokens: int, longest: int, margin: int) -> float:
    """0 up to `longest` - `margin` tokens, then down in a line to -1 at `longest`, -1 beyond."""
    over = tokens - (longest - margin)
    return -min(1.0, over / margin) if over > 0 else 0.0  # never -0


def punished(score: Score, tokens: int, finish_reason: str, longest: int, margin: int) -> Score:
    """Add the component "overlong" to a score and its total, where the reward did not fail.

    A completion that was cut off counts as one of the longest, -1, wherever it was cut.
    """
    if score.failed:
        return score
    value = overlong(longest if finish_reason == "length" else tokens, longest, margin)
    components = {**score.components, "overlong": value}
    return replace(score, components=components, total=score.total + value)


def punish_overlong(scored: ScoredGroup, margin: int) -> ScoredGroup:
    """`punished`, of all completions of a group."""
    longest = scored.group.request.sampling.max_tokens
    scores = [
        punished(score, len(one.token_ids), one.finish_reason, longest, margin)
        for score, one in zip(scored.scores, scored.group.completions, strict=True)
    ]
    return replace(scored, scores=tuple(scores))
