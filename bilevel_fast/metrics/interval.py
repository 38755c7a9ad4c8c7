"""Numbers with 95% intervals: the bootstrap over images.

    mean over groups g of the mean of their values;  draws resample the images of each group with replacement

Groups are the artists of the style table, which averages over them. The interval is that of percentiles. Where every
value is the same the bootstrap says nothing at all (all its draws are alike): 0 of 88 would be surely 0. There a share
gets the interval of Wilson's score, which is exact about what so many equal outcomes leave open.

Random numbers are numpy's PCG64 of (seed), drawn in the order of the groups: the same seed, the same interval.

Source: Efron and Tibshirani 1993, sections 8.3 and 13.3; Wilson 1927.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LOW, _HIGH, _Z = 2.5, 97.5, 1.959963984540054  # percentiles; the normal quantile of the upper


@dataclass(frozen=True)
class Estimate:
    """A measured number and its interval; `low` and `high` are None where there is none."""

    value: float
    low: float | None
    high: float | None
    n: int
    """Images, or pairs of them."""
    interval: str
    """How it was made."""

    def entry(self) -> dict[str, Any]:
        return asdict(self)


def mean(
    values: NDArray[Any], groups: Sequence[str] | None = None, *, share: bool = False, draws: int = 1000, seed: int = 0
) -> Estimate:
    """Mean over groups of their means.

    Args:
        values: (N,), N >= 1.
        groups: N names; by default all are one group.
        share: Values are 0 or 100, percentages of one image each.
        draws: Of the bootstrap.
        seed: Of its random numbers.
    """
    values = np.asarray(values, np.float64)
    parts = _parts(len(values), groups)
    value = float(np.mean([values[part].mean() for part in parts]))
    if len(values) < 2:
        return Estimate(value, None, None, len(values), "none: a single image")
    if share and (values == values[0]).all():
        return Estimate(value, *wilson(value, len(values)), len(values), "95% Wilson: all outcomes are equal")
    rng = np.random.default_rng(seed)
    drawn = np.zeros(draws)
    for part in parts:
        for start in range(0, draws, _chunk(len(part))):
            stop = min(draws, start + _chunk(len(part)))
            chosen = rng.integers(0, len(part), (stop - start, len(part)))
            drawn[start:stop] += values[part][chosen].mean(1) / len(parts)
    return Estimate(value, *_percentiles(drawn), len(values), f"95% bootstrap over images, {draws} draws")


def ratio_of_sums(
    above: NDArray[Any], below: NDArray[Any], change: Callable[[NDArray[Any]], NDArray[Any]], *, draws: int, seed: int
) -> Estimate:
    """`change` of sum(above) / sum(below), pairs resampled together.

    Args:
        above, below: (N,) >= 0, of the same ids in the same order; the sum of `below` is not 0.
        change: Of an array of ratios, elementwise.
    """
    value = float(change(np.array([above.sum() / below.sum()]))[0])
    if len(above) < 2:
        return Estimate(value, None, None, len(above), "none: a single pair")
    rng = np.random.default_rng(seed)
    ratios: list[float] = []
    step = _chunk(len(above))
    for start in range(0, draws, step):
        chosen = rng.integers(0, len(above), (min(step, draws - start), len(above)))
        top, bottom = above[chosen].sum(1), below[chosen].sum(1)
        ratios += (top[bottom > 0] / bottom[bottom > 0]).tolist()
    void = draws - len(ratios)
    method = f"95% bootstrap over pairs of images, {draws} draws" + (f", {void} of them void" if void else "")
    if void > draws // 20:  # what is left would be percentiles of the lucky ones
        return Estimate(value, None, None, len(above), f"none: {void} of {draws} draws had nothing to divide by")
    return Estimate(value, *_percentiles(change(np.array(ratios))), len(above), method)


def normal(value: float, drawn: NDArray[Any], n: int) -> Estimate:
    """value +- 1.96 standard deviations of the draws: for a statistic whose draws are shifted, such as FID."""
    half = _Z * float(np.std(drawn, ddof=1))
    method = f"95% normal, standard error of {len(drawn)} bootstrap draws over images"
    return Estimate(value, max(0.0, value - half), value + half, n, method)


def _parts(count: int, groups: Sequence[str] | None) -> list[NDArray[np.intp]]:
    if groups is None:
        return [np.arange(count)]
    names = np.asarray(groups)
    assert len(names) == count, f"{len(names)} groups for {count} values"
    return [np.flatnonzero(names == name) for name in dict.fromkeys(groups)]


def _percentiles(drawn: NDArray[Any]) -> tuple[float, float]:
    low, high = np.percentile(drawn, [_LOW, _HIGH])
    return float(low), float(high)


def wilson(percent: float, n: int) -> tuple[float, float]:
    """The 95% interval of Wilson's score for a share of n outcomes, both in percent; exact about 0 and about all."""
    share, z = percent / 100, _Z**2
    middle, half = (
        (share + z / (2 * n)) / (1 + z / n),
        _Z * np.sqrt(share * (1 - share) / n + z / (4 * n * n)) / (1 + z / n),
    )
    return 100 * max(0.0, float(middle - half)), 100 * min(1.0, float(middle + half))


def _chunk(n: int) -> int:
    return max(1, 2_000_000 // n)  # indices held at a time
