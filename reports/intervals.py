"""95 % intervals of proportions, in closed form.

Both take their items to be independent draws. Several questions may be asked of one image, and
answers about one image tend to be right or wrong together: the true interval is then wider.
"""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist

Interval = tuple[float, float]  # low, high

_Z = NormalDist().inv_cdf(0.975)


def wilson(correct: int, n: int) -> Interval:
    """The score interval of `correct` of `n` (n >= 1), within [0, 1] also where all are right.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22
    (1927) 209-212.
    """
    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"{correct} right of {n}: needs 0 <= right <= n and n >= 1")
    share, z2 = correct / n, _Z * _Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # The ends are exact where none or all are right; rounding would leave 0 or 1 by an ulp.
    low = 0.0 if correct == 0 else middle - half
    high = 1.0 if correct == n else middle + half
    return low, high


def paired_difference(both: int, first: int, second: int, neither: int) -> Interval:
    """The interval of (share right the first time) - (share right the second time), of the same
    items: `both` were right twice, `first` the first time only, `second` the second time only.

    Method 10 of R. G. Newcombe, "Improved confidence intervals for the difference between binomial
    proportions based on paired data", Statistics in Medicine 17 (1998) 2635-2650: Wilson's limits
    of the two shares, joined by the correlation of the two outcomes.
    """
    n = both + first + second + neither
    one, other = (both + first) / n, (both + second) / n
    low_one, high_one = wilson(both + first, n)
    low_other, high_other = wilson(both + second, n)
    phi = _correlation(both, first, second, neither)

    def reach(a: float, b: float) -> float:
        return sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    difference = one - other
    return (
        difference - reach(one - low_one, high_other - other),
        difference + reach(high_one - one, other - low_other),
    )


def _correlation(both: int, first: int, second: int, neither: int) -> float:
    """phi of the two outcomes, a positive one lessened by Newcombe's continuity correction."""
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    if not margins:
        return 0.0
    product = both * neither - first * second
    if product > 0:
        half = (both + first + second + neither) / 2
        return max(product - half, 0.0) / sqrt(margins)
    return product / sqrt(margins)
