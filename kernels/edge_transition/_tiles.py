"""How large a tile each Triton kernel of the edge transition takes on each chip, and whom it serves.

Data only, and no Triton: the choice for an H100 is made, and tested, anywhere.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..registry.types import Reason, Request
from ..triton_tools.gpu_limits import reasons_against_chip, reasons_against_type
from ..triton_tools.tile_candidates import with_halves


class Tile(NamedTuple):
    """A program's pairs, rows times columns of the pair tensor; how many hidden columns it adds up at once; its run."""

    rows: int
    columns: int
    block: int
    warps: int
    stages: int


class Widths(NamedTuple):
    """Widths as the kernels see them: powers of two, zeros where the weights end.

    Attributes:
        z: Of the pair representation.
        out: Of the new one.
        part: Of one part of the first hidden layer, which is held in registers.
        parts: How many of them.
    """

    z: int
    out: int
    part: int
    parts: int

    @property
    def hidden(self) -> int:
        """The hidden layers' width."""
        return self.part * self.parts


#: `forward` gives the new pair representation; `hidden` computes the same and keeps what the gradients need;
#: `gradients` goes back through both hidden layers.
KERNELS = ("forward", "hidden", "gradients")
#: The widest pair representation, and how wide a part is.
WIDEST, PART = 128, 64

#: Chips that like the same tiles.
SMALL, MIDDLE, HOPPER, BLACKWELL = "8.6, 8.9 and 12.x", "8.0", "9.0", "10.x"
#: Chips -> how many parts of the hidden layers find room in shared memory, as compiled; the published model has 6.
MOST_PARTS: Mapping[str, int] = {SMALL: 6, MIDDLE: 7, HOPPER: 8, BLACKWELL: 6}
#: Chips -> the tiles of `KERNELS`. Chosen by registers, spills and shared memory as compiled ahead of time; nothing has
#: been timed.
TILES: Mapping[str, tuple[Tile, Tile, Tile]] = {
    SMALL: (Tile(8, 8, 32, 8, 2),) * 3,
    MIDDLE: (Tile(8, 8, 64, 8, 2),) * 3,
    HOPPER: (Tile(8, 16, 64, 8, 2),) * 3,
    BLACKWELL: (Tile(8, 16, 32, 8, 2),) * 3,
}


def power_of_two(width: int) -> int:
    """The next power of two, 16 at least: what Triton's tiles are wide, and what a matrix product adds up."""
    return max(16, 1 << (width - 1).bit_length())


def widths(cz: int, cn: int, cz_out: int) -> Widths:
    """The kernels' widths for those of the operation."""
    hidden = cz + 2 * cn
    part = min(PART, power_of_two(hidden))
    return Widths(power_of_two(cz), power_of_two(cz_out), part, -(-hidden // part))


def chips(capability: tuple[int, int]) -> str:
    """Which part of `TILES` a chip of a compute capability reads."""
    if (9, 0) <= capability < (12, 0):
        return BLACKWELL if capability >= (10, 0) else HOPPER
    return MIDDLE if capability in ((8, 0), (8, 7)) else SMALL


def tiles_for(capability: tuple[int, int], kernel: str) -> list[Tile]:
    """The tiles that one of `KERNELS` may be tried in; the first is taken unless another was measured."""
    return with_halves(TILES[chips(capability)][KERNELS.index(kernel)], ("rows",), ("block",), least=4)


def _reason_against_float32(precision: str) -> Reason:
    """Why float32 is left to PyTorch's matrix products.

    As compiled for 8.0 and 9.0 at the published widths, where the hidden layer is 384 wide: with three products of tf32
    in place of one, a tile of 16 pairs spills 1.5 KB a thread, one of 32 pairs 6 KB. With one product of tf32, 32 pairs
    fit without spilling and 64 do not. The weights, 1 MB in float32, are read again for each tile: 33 KB a pair, at
    5.5 TB/s from the L2 cache of an H200 6 ns, where PyTorch's products in tf32 need about 2 ns for a pair's 524 kflop
    and 2 ns more for its hidden layers' way through memory. That is arithmetic, not measured. A test holds the spills.
    """
    fix = "use bfloat16 (autocast, or precision: bfloat16), or kernel 'torch'"
    if precision == "tf32":
        return Reason("in tf32 a tile has room for 32 pairs, too few for the weights that each tile reads", fix)
    return Reason("in float32, a tile's hidden layer does not fit the registers", fix)


def reasons_against(request: Request) -> list[Reason]:
    """Every reason against `request`."""
    reasons = reasons_against_chip(request)
    if not reasons and request.capability is None:
        # Compiled for gfx942, the products of a tile whose left factor comes from registers become plain additions.
        reasons.append(Reason("it is written for NVIDIA's GPUs, and this is AMD's", "use kernel 'torch'"))
    reasons += reasons_against_type(request)
    if request.dtype is torch.float32 and request.precision != "bfloat16":
        reasons.append(_reason_against_float32(request.precision))
    wide = widths(*(request.dims[name] for name in ("cz", "cn", "cz_out")))
    if max(wide.z, wide.out) > WIDEST:
        widest = max(request.dims["cz"], request.dims["cz_out"])
        reasons.append(
            Reason(f"pairs of width {widest} do not fit a tile: {WIDEST} is the limit", "use kernel 'torch'")
        )
    most = MOST_PARTS[chips(request.capability)] if request.capability else max(MOST_PARTS.values())
    if wide.parts > most:
        hidden, limit = request.dims["cz"] + 2 * request.dims["cn"], PART * most
        reasons.append(
            Reason(f"hidden layers of width {hidden} do not fit a tile: {limit} is the limit", "use kernel 'torch'")
        )
    return reasons
