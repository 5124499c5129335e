"""Long completions are punished by their tokens, as in DAPO's equation 13, checked by hand."""

from dataclasses import replace

import pytest
from builders import make_score, make_scored

from medrl.rewards.overlong import overlong, punish_overlong


@pytest.mark.parametrize(
    ("tokens", "value"),
    [(0, 0.0), (12, 0.0), (13, -0.25), (14, -0.5), (15, -0.75), (16, -1.0), (17, -1.0)],
)
def test_the_last_tokens_cost_in_a_line(tokens, value):
    assert overlong(tokens, longest=16, margin=4) == value


def test_a_margin_of_all_tokens_punishes_from_the_first():
    assert [overlong(tokens, 4, 4) for tokens in range(5)] == [0, -0.25, -0.5, -0.75, -1]


def lengthened(scored, lengths, reasons):
    completions = tuple(
        replace(c, token_ids=(5,) * n, logprobs=(-0.5,) * n, finish_reason=reason)
        for c, n, reason in zip(scored.group.completions, lengths, reasons, strict=True)
    )
    return replace(scored, group=replace(scored.group, completions=completions))


def test_it_is_a_component_and_part_of_the_total_but_no_score_of_a_failed_one():
    """`max_tokens` is 16 here. The third was cut off, early; the fourth has no score."""
    scores = (make_score(1.0), make_score(0.0, "wrong"), make_score(), make_score(0.0, "timeout"))
    reasons = ("stop", "stop", "length", "length")
    scored = lengthened(make_scored(scores=scores), (12, 14, 9, 16), reasons)
    punished = punish_overlong(scored, 4)
    assert [score.total for score in punished.scores] == [1.0, -0.5, 0.0, 0.0]
    assert [score.components.get("overlong") for score in punished.scores] == [0, -0.5, -1, None]
    assert punished.scores[1].components["accuracy"] == 0.0
    assert [score.outcome for score in punished.scores] == ["ok", "wrong", "ok", "timeout"]
    assert punished.scores[3] == scores[3]
