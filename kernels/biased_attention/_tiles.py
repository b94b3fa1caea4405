"""How large a tile each Triton kernel of the attention with a dense bias takes on each chip, and whom it serves.

Data only, and no Triton: the choice for an H100 is made, and tested, anywhere.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..registry.types import Reason, Request
from ..triton_tools.gpu_limits import reasons_against_chip, reasons_against_type
from ..triton_tools.tile_candidates import with_halves


class Tile(NamedTuple):
    """A program's share of the logits, and how it is run."""

    queries: int
    keys: int
    warps: int
    stages: int


KERNELS = ("forward", "queries", "keys", "bias")
#: Kernel -> the axes of a tile that a program holds, and those that it runs along.
_AXES = {
    "forward": (("queries",), ("keys",)),
    "queries": (("queries",), ("keys",)),
    "keys": (("keys",), ("queries",)),
    "bias": (("queries", "keys"), ()),
}

#: Chips that like the same tiles. AMD's have no compute capability; their 64 KiB of local memory hold one buffer each.
SMALL, LARGE, AMD = "8.x and 12.x", "9.0 and 10.x", "AMD"
EXACT = "float32"  # exact products, on the ordinary units: a thread holds more of the tile
HALF = "16 bits"

_SMALL_32 = (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3), Tile(32, 64, 4, 3))
_LARGE_32 = (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3))
_LARGE_64 = (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3), Tile(64, 64, 8, 3))
_AMD_32 = (Tile(64, 64, 4, 2),) * 4
_AMD_EXACT_32 = (Tile(32, 32, 4, 2),) * 4
_EXACT_64 = (Tile(32, 32, 4, 3),) * 4
_EXACT_128 = (Tile(32, 32, 8, 2),) * 4

#: Chips, then type, then width of a head -> the tiles of `KERNELS`. Chosen by registers, spills and shared memory as
#: compiled ahead of time; nothing has been timed. SMALL's fit 101,376 bytes.
TILES: Mapping[str, Mapping[str, Mapping[int, tuple[Tile, ...]]]] = {
    SMALL: {
        HALF: {
            16: _SMALL_32,
            32: _SMALL_32,
            64: (Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(32, 64, 4, 3), Tile(32, 64, 4, 3)),
            128: (Tile(64, 32, 4, 3), Tile(64, 32, 4, 3), Tile(32, 32, 4, 3), Tile(32, 32, 4, 3)),
        },
        EXACT: {16: _EXACT_64, 32: _EXACT_64, 64: _EXACT_64, 128: _EXACT_128},
    },
    LARGE: {
        HALF: {16: _LARGE_32, 32: _LARGE_32, 64: _LARGE_64, 128: _LARGE_64},
        EXACT: {16: _EXACT_64, 32: _EXACT_64, 64: _EXACT_64, 128: _EXACT_128},
    },
    AMD: {HALF: {16: _AMD_32, 32: _AMD_32, 64: _AMD_32}, EXACT: {16: _AMD_EXACT_32, 32: _AMD_EXACT_32}},
}

_TYPES = {torch.float32: EXACT, torch.bfloat16: HALF, torch.float16: HALF}


def width(d: int) -> int:
    """How wide a tile a head of size d takes.

    Triton's tiles are as wide as a power of two, and a matrix product adds at least 16 numbers. Only the products see
    the difference: what lies beyond d is not read.
    """
    return max(16, 1 << (d - 1).bit_length())


def chips(capability: tuple[int, int] | None) -> str:
    """Which part of `TILES` a chip of a compute capability reads; None is AMD's."""
    if capability is None:
        return AMD
    return LARGE if (9, 0) <= capability < (12, 0) else SMALL


def tiles_for(capability: tuple[int, int] | None, kernel: str, dtype: torch.dtype, d: int) -> list[Tile]:
    """The tiles that one of `KERNELS` may be tried in; the first is taken unless another was measured.

    Args:
        capability: The chip's compute capability.
        kernel: Which kernel.
        dtype: The type of q.
        d: The head size.

    Raises:
        ValueError: There is none for such heads, which `reasons_against` would have said.
    """
    tiles = TILES[chips(capability)][_TYPES[dtype]].get(width(d))
    if tiles is None:
        raise ValueError(f"the Triton attention has no tile for heads of {d} in {dtype}")
    outer, inner = _AXES[kernel]
    return with_halves(tiles[KERNELS.index(kernel)], outer, inner if _TYPES[dtype] == HALF else ())


def reasons_against(request: Request) -> list[Reason]:
    """The `supports` of both operations."""
    reasons = reasons_against_chip(request)
    if request.device != "cuda":
        return reasons
    if wrong_type := reasons_against_type(request):
        return reasons + wrong_type
    word = str(request.dtype).removeprefix("torch.")
    d, largest = request.dims["d"], max(TILES[chips(request.capability)][_TYPES[request.dtype]])
    if d > largest:
        reasons.append(Reason(f"heads of {d} take too much shared memory: in {word}, {largest} is the limit"))
    return reasons
