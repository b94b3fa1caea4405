"""The few tiles that a kernel may be tried in: data only, so that they are listed, and compiled, anywhere."""

from collections.abc import Sequence
from typing import Any, TypeVar

Tile = TypeVar("Tile", bound=tuple[Any, ...])


def with_halves(
    tile: Tile, outer: Sequence[str], inner: Sequence[str] = (), *, least: int = 16, fewest_warps: int = 4
) -> list[Tile]:
    """A tile, and for each of some axes the same with half of it.

    A smaller one asks for less of a chip, so that it fits where the first does; it may win where a chain is short and
    programs are few, or where more of them find room side by side.

    Args:
        tile: A named tuple that has `warps` and the axes.
        outer: Axes that a program holds: half of them is work for half the warps.
        inner: Axes that it runs along.
        least: How short a half may be.
        fewest_warps: How few warps a half may have.
    """
    values: Any = tile
    found = [tile]
    for axis in (*outer, *inner):
        half, warps = getattr(values, axis) // 2, values.warps
        if axis in outer:
            warps = max(min(fewest_warps, warps), warps // 2)
        if half >= least:
            found.append(values._replace(**{axis: half, "warps": warps}))
    return found
