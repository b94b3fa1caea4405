"""How large a tile each Triton kernel of the attention with a dense bias takes on each chip, and whom it serves.

Data only, and no Triton: the choice for an H100 is made, and tested, anywhere.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from .requests import Reason, Request


class Tile(NamedTuple):
    """A program's share of the logits, and how it is run."""

    queries: int
    keys: int
    warps: int
    stages: int


#: Bytes that a thread block may ask for, by compute capability: from it on, up to the next.
SHARED_MEMORY: Mapping[tuple[int, int], int] = {
    (8, 0): 166_912,
    (8, 6): 101_376,
    (8, 7): 166_912,
    (8, 9): 101_376,
    (9, 0): 232_448,
    (12, 0): 101_376,
}

KERNELS = ("forward", "queries", "keys", "bias")
EXACT = "float32"  # exact products, on the ordinary units: a thread holds more of the tile
HALF = "16 bits"

#: Type, then width of a head -> the tiles of `KERNELS`. They fit the smallest of the chips above: 101,376 bytes.
TILES: Mapping[str, Mapping[int, tuple[Tile, Tile, Tile, Tile]]] = {
    HALF: {
        16: (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
        32: (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
        64: (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
        128: (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    },
    EXACT: {
        16: (Tile(32, 32, 4, 3), Tile(32, 32, 4, 3), Tile(32, 32, 4, 3), Tile(32, 32, 4, 3)),
        32: (Tile(32, 32, 4, 3), Tile(32, 32, 4, 3), Tile(32, 32, 4, 3), Tile(32, 32, 4, 3)),
        64: (Tile(32, 32, 4, 3), Tile(32, 32, 4, 3), Tile(32, 32, 4, 3), Tile(32, 32, 4, 3)),
    },
}

_TYPES = {torch.float32: EXACT, torch.bfloat16: HALF, torch.float16: HALF}


def width(d: int) -> int:
    """How wide a tile a head of size d takes.

    Triton's tiles are as wide as a power of two, and a matrix product adds at least 16 numbers. Only the products see
    the difference: what lies beyond d is not read.
    """
    return max(16, 1 << (d - 1).bit_length())


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes that a thread block of such a chip may ask for."""
    return next((size for first, size in reversed(SHARED_MEMORY.items()) if capability >= first), 0)


def tile_for(capability: tuple[int, int], kernel: str, dtype: torch.dtype, d: int) -> Tile | None:
    """The tile of one of `KERNELS`, None where there is none for such heads.

    Args:
        capability: The chip's compute capability. One table serves all so far; nothing has been timed.
        kernel: Which kernel.
        dtype: The type of q.
        d: The head size.
    """
    tiles = TILES[_TYPES[dtype]].get(width(d))
    return None if tiles is None else tiles[KERNELS.index(kernel)]


def reasons_against(request: Request) -> list[Reason]:
    """The `supports` of both operations."""
    if request.device != "cuda":
        return [Reason(f"it runs on NVIDIA GPUs, not on {request.device}")]
    if request.capability is None:
        return [Reason("it is made for NVIDIA GPUs; it was compiled for AMD's (gfx942), and never run there")]
    reasons = []
    if request.capability < (8, 0):
        chip = ".".join(map(str, request.capability))
        reasons.append(Reason(f"it wants compute capability 8.0 or more, and this is {chip}"))
    if request.dtype not in _TYPES:
        name = str(request.dtype).removeprefix("torch.")
        reasons.append(Reason(f"it computes in float32, bfloat16 and float16, not in {name}", "cast q, k and v"))
        return reasons
    d, largest = request.dims["d"], max(TILES[_TYPES[request.dtype]])
    if d > largest:
        word = str(request.dtype).removeprefix("torch.")
        reasons.append(Reason(f"a head of {d} takes more memory than a block has: {largest} is the limit in {word}"))
    return reasons
