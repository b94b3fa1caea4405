"""Which residues of a structure an item shows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import numpy as np
from numpy.typing import NDArray

_ENOUGH = 0.5


def draw_crop(
    masks: Sequence[NDArray[np.bool_]],
    length: int | None,
    kind: Literal["contiguous", "chains"],
    rng: np.random.Generator,
) -> list[slice]:
    """Draws the residues of an item.

    Args:
        masks: For each chain, which of its residues have a frame. Its first and its last residue do.
        length: How many residues are wanted; None wants them all.
        kind: ``contiguous`` takes one stretch of the chains as they follow each other; ``chains`` shares the length
            among the chains, in random order, and takes a stretch of each.
        rng: Where draws come from.

    Returns:
        A slice of each chain, empty where it is left out. Together they have ``length`` residues, or all if there are
        fewer. A stretch in which less than half the residues have a frame is not drawn where there is a better one.

    Source: ``chains`` is algorithm 1 of Evans et al., "Protein complex prediction with AlphaFold-Multimer" (2021).
    """
    sizes = [len(mask) for mask in masks]
    if length is None or sum(sizes) <= length:
        return [slice(0, size) for size in sizes]
    if kind == "chains":
        shares = _shares(sizes, length, rng)
        starts = [_start(mask, share, rng) for mask, share in zip(masks, shares, strict=True)]
        return [slice(start, start + share) for start, share in zip(starts, shares, strict=True)]
    start = _start(np.concatenate(masks), length, rng)
    crop = []
    for size, stop in zip(sizes, accumulate(sizes), strict=True):
        first = stop - size  # of this chain, among all residues
        low, high = (min(max(edge - first, 0), size) for edge in (start, start + length))
        crop.append(slice(low, high))
    return crop


def _start(mask: NDArray[np.bool_], length: int, rng: np.random.Generator) -> int:
    """The first residue of a stretch."""
    frames_before = np.concatenate(([0], np.cumsum(mask)))
    frames = frames_before[length:] - frames_before[: len(mask) - length + 1]
    return int(rng.choice(np.flatnonzero(frames >= min(_ENOUGH * length, frames.max()))))


def _shares(sizes: Sequence[int], length: int, rng: np.random.Generator) -> list[int]:
    """How many residues of each chain are taken: ``length`` in all, which is less than there are."""
    shares = [0] * len(sizes)
    wanted, later = length, sum(sizes)
    for chain in rng.permutation(len(sizes)).tolist():
        later -= sizes[chain]
        most = min(sizes[chain], wanted)
        least = min(sizes[chain], max(0, wanted - later))
        shares[chain] = int(rng.integers(least, most, endpoint=True))
        wanted -= shares[chain]
    return shares
