"""What the rollout benchmark counts is vLLM's own, and both of its sides ask for the same draws."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from builders import make_engine, make_request

from medrl.bench import rollout
from medrl.bench.engines_at_work import Counter, Counts
from medrl.bench.facts import Refused

COMPLETIONS = 8
ASKED = [make_request(draw, completions=COMPLETIONS) for draw in range(4)]

SAMPLED = rollout.Sampled(
    side="groups",
    seconds=1.0,
    counts=Counts(encoded=4, prompts=32, hits=7_168),
    images=4,
    completions=32,
    possible=7_168,
    lengths=(8,) * 32,
    prompts=(270,) * 4,
)


@pytest.mark.parametrize("number", [1, 2, 4])
async def test_both_sides_draw_the_same_completions_and_differ_in_who_does(number: int) -> None:
    """Whole groups, as many for each engine, against a completion at a time, dealt out in turns."""
    engines = [await make_engine(index) for index in range(number)]
    whole = await rollout.as_groups(engines, ASKED)
    dealt = await rollout.as_completions(engines, ASKED)
    assert [one for group in whole for one in group.completions] == [
        one for group in dealt for one in group.completions
    ]
    seeds = [group.request.seed + i for group in whole for i in range(COMPLETIONS)]
    assert [group.request.seed for group in dealt] == seeds == sorted(set(seeds))
    by = [[group.engine for group in groups] for groups in (whole, dealt)]
    assert [by[0].count(index) for index in range(number)] == [len(ASKED) // number] * number
    assert by[1] == list(range(number)) * (len(dealt) // number)


def test_a_group_finds_its_prompts_whole_blocks_but_never_a_last_token() -> None:
    """Counted block by block: the first completion fills them, the others read what is whole."""
    for prompt, completions, block in product((31, 32, 33, 270, 288, 289), (1, 2, 8), (16, 32)):
        found = 0
        for _ in range(1, completions):
            end = block
            while end < prompt:  # a block with the last token is computed again
                found += block
                end += block
        assert rollout.possible_hits(prompt, completions, block) == found


def test_counts_come_from_vllms_own_statistics() -> None:
    """Its classes, as its scheduler fills them; a step without statistics adds nothing."""
    from vllm.v1.metrics.loggers import StatLoggerBase
    from vllm.v1.metrics.stats import SchedulerIterationDetails, SchedulerStats

    counter = Counter()
    assert {name for name in vars(StatLoggerBase) if not name.startswith("_")} <= set(dir(counter))
    for images in (1, 0):
        stats = SchedulerStats(
            iteration_details=SchedulerIterationDetails(
                iteration_index=0,
                num_ctx_requests=2,
                num_ctx_tokens=284,
                num_generation_requests=0,
                num_generation_tokens=0,
                elapsed_ms=1.0,
                num_encoder_inputs=images,
            )
        )
        stats.prefix_cache_stats.record(num_tokens=270, num_hits=0, preempted=False)
        stats.prefix_cache_stats.record(num_tokens=270, num_hits=256, preempted=False)
        counter.record(stats, None, mm_cache_stats=None, engine_idx=0)
    counter.record(None, None)
    counter.record(SchedulerStats(), None)
    assert counter.counts == Counts(encoded=1, prompts=4, hits=512)
    assert counter.counts - Counts(encoded=1, prompts=2, hits=256) == Counts(prompts=2, hits=256)


@pytest.mark.parametrize(
    "counts",
    [
        Counts(),
        Counts(encoded=4, prompts=31, hits=7_168),
        Counts(encoded=3, prompts=32, hits=7_168),
        Counts(encoded=4, prompts=32, hits=7_169),
    ],
    ids=["statistics off", "a completion left out", "an image not seen", "caches left full"],
)
def test_counts_that_cannot_be_are_not_reported(counts: Counts) -> None:
    SAMPLED.check()
    with pytest.raises(Refused, match="groups: "):
        replace(SAMPLED, counts=counts).check()


def test_shares_are_of_the_distinct_images_and_of_what_one_engine_finds() -> None:
    spread = replace(SAMPLED, counts=Counts(encoded=16, prompts=32, hits=4_096))
    assert (SAMPLED.encoded, SAMPLED.share) == (1.0, 1.0)
    assert spread.encoded == 4.0
    assert spread.share == pytest.approx(4 / 7)  # at four engines, four of eight come first
