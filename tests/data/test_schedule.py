"""The order of prompts and the streams of completions are functions of (seed, draw)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medrl.data.schedule import Schedule, group_seed

seeds = st.integers(0, 2**31 - 1)


@given(st.integers(1, 60), seeds, st.integers(0, 5))
def test_every_epoch_draws_every_prompt_once(num_prompts: int, seed: int, epoch: int) -> None:
    schedule = Schedule(num_prompts, seed)
    start = epoch * num_prompts
    drawn = [schedule[d] for d in range(start, start + num_prompts)]
    assert sorted(drawn) == list(range(num_prompts))


@given(st.integers(1, 30), seeds, st.lists(st.integers(0, 300), max_size=20))
def test_any_draw_is_the_same_in_any_order_of_asking(
    num_prompts: int, seed: int, draws: list[int]
) -> None:
    whole = Schedule(num_prompts, seed)
    in_order = [whole[d] for d in range(301)]
    resumed = Schedule(num_prompts, seed)
    assert [resumed[d] for d in draws] == [in_order[d] for d in draws]


def test_epochs_and_seeds_differ_in_order() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        schedule = Schedule(50, seed)
        return [schedule[d] for d in range(50 * epoch, 50 * epoch + 50)]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(one) for one in orders}) == 4


def test_order_is_pinned_so_that_old_runs_resume() -> None:
    schedule = Schedule(5, 7)
    assert [schedule[d] for d in range(10)] == [0, 3, 1, 2, 4, 0, 3, 2, 1, 4]


def test_a_schedule_without_prompts_and_a_negative_draw_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        Schedule(0, 0)
    with pytest.raises(IndexError, match="from 0"):
        Schedule(3, 0)[-1]


@given(seeds, st.integers(1, 64), st.integers(0, 10**6), st.integers(0, 10**6))
def test_streams_of_two_draws_never_overlap(
    run_seed: int, completions: int, first: int, second: int
) -> None:
    """Also not in the low 32 bits, which are all that torch's CPU generator reads."""
    low, high = sorted((first, second))
    a = group_seed(run_seed, low, completions)
    b = group_seed(run_seed, high, completions)
    if low != high:
        assert a + completions <= b
        assert (a + completions - 1) % 2**32 < b % 2**32
    assert 0 <= a <= b + completions - 1 < 2**63


@given(seeds, seeds, st.integers(0, 10**6), st.integers(0, 10**6))
def test_two_runs_share_no_stream(a: int, b: int, draw: int, other: int) -> None:
    if a != b:
        assert group_seed(a, draw, 8) >> 32 != group_seed(b, other, 8) >> 32
        assert group_seed(a, draw, 8) % 2**32 != group_seed(b, draw, 8) % 2**32


def test_two_runs_draw_different_numbers_on_the_cpu() -> None:
    def number(run_seed: int) -> float:
        generator = torch.Generator().manual_seed(group_seed(run_seed, 3, 8))
        return float(torch.rand((), generator=generator))

    assert len({number(run_seed) for run_seed in range(20)}) == 20


@pytest.mark.parametrize(
    ("run_seed", "draw", "completions"),
    [(-1, 0, 8), (2**31, 0, 8), (0, -1, 8), (0, 0, 0), (0, 2**28, 8)],
)
def test_seeds_out_of_range_are_refused(run_seed: int, draw: int, completions: int) -> None:
    with pytest.raises(ValueError, match=r"streams"):
        group_seed(run_seed, draw, completions)


def test_the_last_stream_of_a_run_is_in_range() -> None:
    assert group_seed(2**31 - 1, 2**28 - 1, 8) + 7 < 2**63
