"""Statistics of measurements: median, quartiles, ratio to a baseline, and the power law of growth with length."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

from .timing import ratio_interval


@dataclass(frozen=True)
class Spread:
    """Times of one side, in milliseconds.

    Attributes:
        median: The middle.
        low: The lower quartile.
        high: The upper quartile.
        fastest: The smallest.
    """

    median: float
    low: float
    high: float
    fastest: float


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which a share of them lies, between neighbours by their distance; 0.5 is the median."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def spread(seconds: Sequence[float]) -> Spread:
    """Median, quartiles and the fastest of samples, in milliseconds."""
    in_ms = [1e3 * value for value in seconds]
    return Spread(statistics.median(in_ms), quantile(in_ms, 0.25), quantile(in_ms, 0.75), min(in_ms))


def ratio(baseline: Sequence[float], side: Sequence[float]) -> tuple[float, float, float]:
    """Median of the baseline over the side's, and the 95% interval of that, over samples of the same rounds.

    Raises:
        ValueError: They are not of the same rounds.
    """
    if len(baseline) != len(side):
        raise ValueError(f"{len(baseline)} rounds of the baseline, {len(side)} of the side")
    return statistics.median(baseline) / statistics.median(side), *ratio_interval(baseline, side)


@dataclass(frozen=True)
class Fit:
    """`scale * length ** exponent`."""

    exponent: float
    scale: float

    def at(self, length: float) -> float:
        """The fitted value at a length."""
        return self.scale * length**self.exponent


def power_law(lengths: Sequence[float], values: Sequence[float]) -> Fit | None:
    """The power law that fits values by least squares in both logarithms; None with fewer than two lengths.

    Args:
        lengths: Residues; above zero.
        values: Times or megabytes; what is not above zero has no logarithm and is left out.
    """
    points = [(log(n), log(v)) for n, v in zip(lengths, values, strict=True) if v > 0]
    if len({x for x, _ in points}) < 2:
        return None
    mean_x, mean_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return Fit(slope, exp(mean_y - slope * mean_x))
