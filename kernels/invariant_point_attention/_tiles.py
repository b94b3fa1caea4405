"""How the Triton kernels of invariant point attention are run on each chip, and whom they serve.

Data only, and no Triton: the choice for an H100 is made, and tested, anywhere.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..registry.types import Reason, Request
from ..triton_tools.gpu_limits import reasons_against_chip, reasons_against_type, shared_memory
from ..triton_tools.tile_candidates import with_halves


class Plan(NamedTuple):
    """A program's share of the pairs, and how it is run.

    Attributes:
        fused: Whether the kernel computes the scalar and point part of the logits, or reads it.
        queries: Rows of a tile.
        keys: Columns of a tile.
        heads: How many heads a tile has, real or not.
        warps: Warps of a program.
        stages: Tiles of z that are under way.
        chunks: In how many parts the channels of a tile come.
        descriptors: Whether tiles are read through tensor descriptors, by a kernel of their own.
    """

    fused: bool
    queries: int
    keys: int
    heads: int
    warps: int
    stages: int
    chunks: int = 1
    descriptors: bool = False


#: The widest lifted head, without its norm, that is served by computing all of the logits in the kernel.
FUSED_WIDTH = 64
#: Heads and channels of tiles, together: what a thread's registers hold. 32 heads and 128 channels would do for the
#: forward pass beside 16 bits, in 4 rows (90,112 bytes, a stack of 40 on 9.0 and 88 on 10.0), but both passes and all
#: types take the same heads, and the backward pass spills 512 bytes in 1 row there and 4,128 in float32.
CELLS = ((8, 128), (16, 128), (8, 256))
CHANNELS = max(channels for _, channels in CELLS)
#: Channels of z beyond which a tile takes them in two parts.
CHUNK = 128
#: The oldest capability with a copy engine that descriptors tell of tensors.
DESCRIPTORS = (9, 0)
FORWARD, BACKWARD = "forward", "backward"
EXACT, HALF = "float32", "16 bits"
FUSED, WIDE = True, False

Tile = tuple[int, int, int, int]  # rows, columns, warps, stages
Variant = tuple[str, str, bool]

#: Bytes of shared memory a block -> kernel, type of z and way -> heads and channels of a tile -> the tile. Chosen by
#: shared memory, registers and spills as compiled ahead of time (tests/goldens/triton); nothing has been timed. A
#: size takes the next larger heads and channels, whose memory holds it.
#:
#: More rows cost few more instructions, since 16 of them fill a product's side anyway. Float32's forward with 8 heads
#: takes 193 instructions a pair in 4 rows and 104 in 8 on 9.0, where the time to read z leaves room for 108; its
#: backward 611 in 2 and 317 in 4; 16 heads beside 16 bits 52 and 31. There is no fused way for float32: as three
#: products of tf32 for z and split 16 bits for the rest, 8 rows take 135 instructions, spill 328 bytes in the loop and
#: leave no room for a second tile of z; and the logits that it would save are 64 of a pair's 576 bytes in the kernel
#: that reads z.
TABLE: Mapping[int, Mapping[Variant, Mapping[tuple[int, int], Tile]]] = {
    166_912: {
        (FORWARD, HALF, FUSED): {(8, 128): (8, 16, 8, 2)},
        (FORWARD, HALF, WIDE): {(8, 128): (8, 16, 8, 3), (16, 128): (8, 16, 8, 3), (8, 256): (4, 16, 8, 3)},
        (FORWARD, EXACT, WIDE): {(8, 128): (4, 16, 8, 3), (16, 128): (4, 16, 8, 2), (8, 256): (4, 16, 8, 2)},
        (BACKWARD, HALF, FUSED): {(8, 128): (4, 16, 8, 2)},
        (BACKWARD, HALF, WIDE): {(8, 128): (8, 16, 8, 2), (16, 128): (4, 16, 8, 2), (8, 256): (4, 16, 8, 2)},
        (BACKWARD, EXACT, WIDE): {(8, 128): (2, 16, 8, 2), (16, 128): (1, 16, 8, 2), (8, 256): (1, 16, 8, 2)},
    },
    101_376: {
        (FORWARD, HALF, FUSED): {(8, 128): (4, 16, 8, 2)},
        (FORWARD, HALF, WIDE): {(8, 128): (8, 16, 8, 3), (16, 128): (4, 16, 8, 3), (8, 256): (4, 16, 8, 3)},
        (FORWARD, EXACT, WIDE): {(8, 128): (4, 16, 8, 2), (16, 128): (2, 16, 8, 2), (8, 256): (2, 16, 8, 2)},
        (BACKWARD, HALF, WIDE): {(8, 128): (4, 16, 8, 2), (16, 128): (4, 16, 8, 2), (8, 256): (2, 16, 8, 2)},
        (BACKWARD, EXACT, WIDE): {(8, 128): (2, 16, 8, 2), (16, 128): (1, 16, 8, 2), (8, 256): (1, 16, 8, 2)},
    },
    232_448: {
        (FORWARD, HALF, FUSED): {(8, 128): (8, 16, 8, 3)},
        (FORWARD, HALF, WIDE): {(8, 128): (8, 16, 8, 3), (16, 128): (8, 16, 8, 3), (8, 256): (8, 16, 8, 3)},
        (FORWARD, EXACT, WIDE): {(8, 128): (8, 16, 8, 3), (16, 128): (4, 16, 8, 2), (8, 256): (4, 16, 8, 2)},
        (BACKWARD, HALF, FUSED): {(8, 128): (8, 16, 8, 2)},
        (BACKWARD, HALF, WIDE): {(8, 128): (8, 16, 8, 3), (16, 128): (4, 16, 8, 2), (8, 256): (4, 16, 8, 2)},
        (BACKWARD, EXACT, WIDE): {(8, 128): (4, 16, 8, 2), (16, 128): (1, 16, 8, 2), (8, 256): (1, 16, 8, 2)},
    },
}

#: The same for the forward kernel that reads 16-bit tiles through tensor descriptors (capability 9.0 and more): heads,
#: channels and `halves_width` of a tile -> the tile. Rows of values are up to `FUSED_WIDTH` wide.
#:
#: These are tried by `foldkernels tune`, and not taken unmeasured: neither they nor the pointers have run on a GPU, and
#: what a driver says to a descriptor no compiler tells. They should win: 16 rows take 17 instructions a pair on 9.0
#: where 8 rows by pointers take 38, and read 120 bytes of keys and values a pair beside z's 256, not 320.
#:
#: No more than 8 heads: 16 in 8 rows ask for 233,536 bytes, and in 4 rows take 72 instructions a pair; 32 in 4 rows ask
#: for 332,352 bytes and spill 472 on 9.0, 2,464 on 10.0, where the product with the bias weight goes to tensor memory.
DESCRIBED: Mapping[int, Mapping[tuple[int, int, int], Tile]] = {
    232_448: {
        (8, 128, 32): (16, 16, 8, 3),
        (8, 128, 64): (8, 16, 8, 3),
        (8, 256, 32): (8, 16, 8, 3),
    },
}


def width(size: int, least: int = 16) -> int:
    """How wide a tile is for `size` columns: a power of two."""
    return max(least, 1 << (size - 1).bit_length())


def heads_at_once(cz: int) -> int:
    """How many heads a tile may have. More are served in groups, for each of which z is loaded."""
    most = 0
    for heads, channels in CELLS:  # in words that Dynamo traces
        if cz <= channels and heads > most:
            most = heads
    return most


def halves_width(d: int, points: int) -> int:
    """How wide a tile of points beside half of the scalars is, for d columns of which so many are points'."""
    return width(points + -(-(d - points) // 2))


def _cell(h: int, cz: int) -> tuple[int, int]:
    """The smallest heads and channels of the table that hold so many; zeros where none do."""
    return next((cell for cell in CELLS if h <= cell[0] and cz <= cell[1]), (0, 0))


def _type(dtype: torch.dtype) -> str:
    return EXACT if dtype is torch.float32 else HALF


def plans_for(
    capability: tuple[int, int] | None,
    kernel: str,
    dtype: torch.dtype,
    *,
    h: int,
    cz: int,
    d: int,
    dv: int,
    points: int,
) -> list[Plan]:
    """A few ways to run a kernel, all of which fit the chip; the first is taken unless another was measured.

    Args:
        capability: The chip's compute capability.
        kernel: "forward" or "backward".
        dtype: The type of z.
        h: Heads.
        cz: Channels of z.
        d: The width of a lifted query, without the one for the norms.
        dv: The width of lifted values.
        points: How many of a lifted query's columns are of points.

    Raises:
        ValueError: There is none, which `reasons_against` would have said.
    """
    table = TABLE.get(shared_memory(capability), {})
    cell = _cell(h, cz)
    found = []
    for way in (FUSED, WIDE):
        tile = table.get((kernel, _type(dtype), way), {}).get(cell)
        if tile is not None and (way is WIDE or max(d, dv) <= FUSED_WIDTH):
            queries, keys, warps, stages = tile
            found.append(Plan(way, queries, keys, cell[0], warps, stages, max(1, cell[1] // CHUNK)))
    if not found:
        raise ValueError(f"the Triton kernels have no tile for {h} heads and pairs of {cz} in {dtype}")
    plans = [*with_halves(found[0], ("queries",), least=1, fewest_warps=8), *found[1:]]
    if (kernel, _type(dtype)) == (FORWARD, HALF) and dv <= FUSED_WIDTH:
        plans += _described(capability, h, cz, halves_width(d, points))
    return plans


def _described(capability: tuple[int, int] | None, h: int, cz: int, columns: int) -> list[Plan]:
    """The ways that read tiles through descriptors."""
    table = DESCRIBED.get(shared_memory(capability), {}) if capability and capability >= DESCRIPTORS else {}
    for (heads, channels, widest), (queries, keys, warps, stages) in table.items():
        if h <= heads and cz <= channels and columns <= widest:
            plan = Plan(FUSED, queries, keys, heads, warps, stages, descriptors=True)
            return with_halves(plan, ("queries",), least=1, fewest_warps=8)
    return []


def reasons_against(request: Request) -> list[Reason]:
    """The kernel's `supports`."""
    reasons = reasons_against_chip(request)
    if request.device != "cuda":
        return reasons
    reasons += reasons_against_type(request)
    if "logit_dropout" in request.options:
        # Dropped logits keep the terms that are constant over the keys, which lifting leaves out.
        reasons.append(Reason("it cannot drop logits", "use kernel 'reference', or set the IPA's dropout to 0"))
    if request.capability is None:
        why = "AMD's compiler makes plain multiply-adds of its products, with hundreds of registers spilled"
        return [*reasons, Reason(why, "use kernel 'torch'")]
    cz = request.dims["cz"]
    h = min(request.dims["h"], heads_at_once(cz))
    if cz > CHANNELS:
        reasons.append(Reason(f"pairs of {cz} take too much shared memory: {CHANNELS} is the limit"))
    if not reasons and (kernel := _without_tile(request)):
        why = f"{h} heads and pairs of {cz} take more shared memory in the {kernel} pass than this GPU has for a block"
        reasons.append(Reason(f"{why} ({shared_memory(request.capability):,} bytes)"))
    return reasons


def _without_tile(request: Request) -> str:
    """A pass that has no tile; empty where all have one. z may be narrower than the rest."""
    table = TABLE.get(shared_memory(request.capability), {})
    cz = request.dims["cz"]
    cell = _cell(min(request.dims["h"], heads_at_once(cz)), cz)
    types = {HALF, _type(request.dtype)}
    passes = (FORWARD, BACKWARD) if request.grad else (FORWARD,)
    return next((kernel for kernel in passes for z in types if cell not in table.get((kernel, z, WIDE), {})), "")
