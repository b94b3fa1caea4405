"""Compiles the Triton edge transition ahead of time, at the published widths and at the widest that it serves."""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from foldkernels.kernels.edge_transition import _tiles as tiles

from .triton_tools import CHIPS, compiled
from .usage_table import FIRST, OTHERS, Variant

TYPES = ("bf16", "fp16")
#: Multiflow's: pairs, residues' share, new pairs.
PUBLISHED = (128, 128, 128)
#: Bytes of stack a thread. On 9.0 they are used before and after the loop over hidden columns, and not in it.
STACK = 512
#: What becomes of products on each chip.
PRODUCTS = {80: r"mma\.sync", 89: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}


def widest(arch: int) -> tuple[int, int, int]:
    """The widest layers that `supports` lets through."""
    hidden = tiles.PART * tiles.MOST_PARTS[tiles.chips(CHIPS[arch])]
    return (tiles.WIDEST, (hidden - tiles.WIDEST) // 2, tiles.WIDEST)


def variants() -> Iterator[Variant]:
    """Everything that the dispatcher can choose, with a mask."""
    for dtype in TYPES:
        for kernel in tiles.KERNELS:
            for arch, capability in CHIPS.items():
                found = tiles.tiles_for(capability, kernel)
                for tile in found:
                    first = tile is found[0]
                    yield Variant(
                        arch,
                        f"{dtype} {kernel} {'x'.join(map(str, tile))}",
                        rank=FIRST if first else OTHERS,
                        quick=first and (dtype, arch) == ("bf16", 90),
                        stack=STACK,
                        compile=partial(code, arch, kernel, dtype, tile),
                        faults=partial(faults, arch),
                    )


def code(
    arch: int,
    kernel: str,
    dtype: str,
    tile: tiles.Tile,
    *,
    sizes: tuple[int, int, int] = PUBLISHED,
    precision: str = "ieee",
) -> Any:
    """A kernel's code for a chip, in a tile."""
    from foldkernels.kernels.edge_transition._triton import KERNELS

    function, wide = KERNELS[kernel], tiles.widths(*sizes)
    constants: dict[str, Any] = {
        "CZ": sizes[0], "C_OUT": sizes[2], "Z": wide.z, "OUT": wide.out, "PART": wide.part, "PARTS": wide.parts,
        "I": tile.rows, "J": tile.columns, "BLOCK": min(tile.block, wide.part), "MASKED": True,
        "BACKWARD": kernel == "hidden", "PRECISION": precision, "INTERPRETED": False,
    }  # fmt: skip
    names = function.arg_names
    wide_ones = "there_ first_i first_j b_second last_i last_j norm_weight norm_bias d_norm_weight d_norm_bias".split()
    numbers = {"first": "i32", "last": "i32", "n": "i32", "eps": "fp32"}
    strides = [name for name in names if name.endswith(("_i", "_j")) and not name.startswith(("first_", "last_"))]
    types = {**dict.fromkeys(names, f"*{dtype}"), **dict.fromkeys(wide_ones, "*fp32")}
    types |= {**dict.fromkeys(strides, "i32"), **numbers}
    # Pointers and strides are multiples of 16; sizes are anything.
    return compiled(arch, function, types, constants, numbers, warps=tile.warps, stages=tile.stages)


def faults(arch: int, found: Any) -> list[str]:
    """Products belong on the tensor cores."""
    return [] if re.search(PRODUCTS[arch], found.asm["ptx"]) else ["the products are not where they should be"]
