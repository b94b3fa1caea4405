"""How a measurement grows with the length: a straight line through the logarithms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log


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
