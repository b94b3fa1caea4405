"""How large a tile each Triton kernel of factorised point attention takes on each chip, and whom it serves.

Data only, and no Triton: the choice for an H100 is made, and tested, anywhere.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..registry.types import Reason, Request
from ..triton_tools.gpu_limits import reasons_against_chip, reasons_against_type, shared_memory
from ..triton_tools.tile_candidates import with_halves


class Tile(NamedTuple):
    """A program's share of the logits, the columns that it sums up or multiplies at once, and how it is run."""

    queries: int
    keys: int
    columns: int
    warps: int
    stages: int


KERNELS = ("forward", "queries", "keys", "values")

SMALL, HOPPER, BLACKWELL = "8.x and 12.x", "9.0", "10.x"
EXACT, HALF = "float32", "16 bits"

_EXACT = (Tile(16, 32, 32, 4, 2),) * 4
_SMALL = (Tile(32, 32, 128, 4, 2), Tile(16, 32, 64, 4, 2), Tile(32, 32, 64, 4, 2), Tile(32, 32, 128, 4, 2))
_HOPPER = (Tile(64, 32, 128, 8, 2), *_SMALL[1:])
_BLACKWELL = (_HOPPER[0], _SMALL[1], Tile(32, 16, 64, 4, 2), _SMALL[3])

#: Chips, then type -> the tiles of `KERNELS`. Chosen by registers, spills and shared memory of the published size as
#: compiled ahead of time; nothing has been timed. `queries` of 32 rows would spill 200 to 400 bytes in 16 bits,
#: `keys` of 32 on 10.x 176.
TILES: Mapping[str, Mapping[str, tuple[Tile, ...]]] = {
    SMALL: {HALF: _SMALL, EXACT: _EXACT},
    HOPPER: {HALF: _HOPPER, EXACT: _EXACT},
    BLACKWELL: {HALF: _BLACKWELL, EXACT: _EXACT},
}

_TYPES = {torch.float32: EXACT, torch.bfloat16: HALF, torch.float16: HALF}

#: The least that a matrix product adds up.
_LEAST = 16
#: Float32 columns of a tile: three for each point, and the rank of the bias.
_FEATURES = 64
#: `keys` with more of them than the second number takes the first number of bytes in its first tile for 16 bits, as
#: compiled: chips that have less start from a smaller one.
_WIDE_KEYS, _NARROW_FEATURES = 102_656, 32


def width(columns: int) -> int:
    """How wide a tile of so many columns is: Triton's are as wide as a power of two."""
    return max(_LEAST, 1 << (columns - 1).bit_length()) if columns else _LEAST


def chunks(columns: int, tile: Tile) -> tuple[int, int]:
    """The width of a tile's columns, and how many tiles hold all of them."""
    wide = min(width(columns), tile.columns)
    return wide, max(1, -(-columns // wide))


def chips(capability: tuple[int, int] | None) -> str:
    """Which part of `TILES` a chip of a compute capability reads; None is AMD's."""
    if capability is None or not (9, 0) <= capability < (12, 0):
        return SMALL
    return BLACKWELL if capability >= (10, 0) else HOPPER


def tiles_for(capability: tuple[int, int] | None, kernel: str, dtype: torch.dtype, features: int = 0) -> list[Tile]:
    """The tiles that one of `KERNELS` may be tried in; the first is taken unless another was measured.

    Args:
        capability: The chip's compute capability; None is AMD's.
        kernel: Which kernel.
        dtype: The type of q.
        features: Float32 columns of queries.
    """
    tile = TILES[chips(capability)][_TYPES[dtype]][KERNELS.index(kernel)]
    held = "queries" if kernel in ("forward", "queries") else "keys"
    found = with_halves(tile, (held,), ("keys" if held == "queries" else "queries",))
    wide = kernel == "keys" and _TYPES[dtype] == HALF and features > _NARROW_FEATURES
    return found[1:] if wide and shared_memory(capability) < _WIDE_KEYS else found


def reasons_against(request: Request) -> list[Reason]:
    """Every reason against `request`. Channels, points of values, and the pair's width and rank have no limit."""
    reasons = reasons_against_chip(request)
    if request.device != "cuda":
        return reasons
    reasons += reasons_against_type(request)
    if request.capability is None:
        reasons.append(Reason("its products of float32 points are NVIDIA's", "use kernel 'torch'"))
    if "plain_lifting" in request.options:
        reasons.append(
            Reason("it lifts nothing, and so cannot round as FlashIPA does", "use lifting='precise' or kernel 'torch'")
        )
    features = 3 * request.dims["p"] + (request.dims["r"] if "bias_factors" in request.options else 0)
    for what, columns in (("query points and rank", features), ("value points", 3 * request.dims["pv"])):
        if columns > _FEATURES:
            reasons.append(
                Reason(
                    f"{what} are {columns} columns of float32, and {_FEATURES} is its limit",
                    "use kernel 'torch', which has none",
                )
            )
    return reasons
