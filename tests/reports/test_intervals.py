"""Intervals against published numbers, and at the edges where others leave [0, 1]."""

import pytest

from medrl.reports.intervals import paired_difference, wilson


def test_wilson_by_hand() -> None:
    """8 of 10, z = 1.959964, z^2 = 3.841459: the middle is (0.8 + 0.192073) / 1.384146 = 0.716740,
    the half width 1.959964 sqrt(0.016 + 0.009604) / 1.384146 = 0.226578."""
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)


def test_wilson_as_published() -> None:
    """Newcombe (1998), Statistics in Medicine 17, 857-872, table I, method 3."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 480, 10**6])
def test_wilson_stays_within_0_and_1_and_holds_the_share(n: int) -> None:
    assert wilson(0, n)[0] == 0
    assert wilson(n, n)[1] == 1
    for correct in (0, n // 2, n):
        low, high = wilson(correct, n)
        assert 0 <= low <= correct / n <= high <= 1
        assert low < high  # one item, right or wrong, proves nothing


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (2, 1), (-1, 1)])
def test_wilson_refuses_what_is_no_share(correct: int, n: int) -> None:
    with pytest.raises(ValueError, match="needs 0 <= right <= n"):
        wilson(correct, n)


def test_a_paired_difference_as_published() -> None:
    """Altman, Machin, Bryant, Gardner, "Statistics with confidence" (2000), table 6.2."""
    assert paired_difference(14, 5, 0, 22) == pytest.approx((0.0115, 0.2265), abs=5e-5)


def test_a_paired_difference_by_hand() -> None:
    """All ten right seeing, five blind: phi is 0 for a margin is empty, so the ends are
    0.5 - sqrt((1 - 0.722467)^2 + (0.763407 - 0.5)^2) and 0.5 + sqrt(0 + (0.5 - 0.236593)^2)."""
    assert paired_difference(5, 5, 0, 0) == pytest.approx((0.117367, 0.763407), abs=1e-6)


def test_the_other_way_round_a_paired_difference_changes_its_sign() -> None:
    low, high = paired_difference(14, 5, 2, 22)
    assert paired_difference(14, 2, 5, 22) == pytest.approx((-high, -low))


@pytest.mark.parametrize(
    "table", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (9, 0, 0, 9), (0, 9, 9, 0)]
)
def test_a_paired_difference_is_never_sure_and_never_beyond_1(table: tuple[int, ...]) -> None:
    low, high = paired_difference(*table)
    difference = (table[1] - table[2]) / sum(table)
    assert -1 <= low <= difference <= high <= 1
    assert low < high


def test_pairs_that_agree_make_the_interval_of_the_difference_narrow() -> None:
    """That is what asking the same prompts twice is for."""
    low, high = paired_difference(240, 10, 0, 250)
    apart = paired_difference(130, 120, 110, 140)  # the same shares, nearly independent
    assert high - low < 0.5 * (apart[1] - apart[0])
