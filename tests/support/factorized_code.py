"""Compiles the Triton factorised point attention ahead of time, at FlashIPA's published size and the widest points."""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from foldkernels.kernels.factorized_point_attention import _tiles as tiles

from .triton_tools import CHIPS, compiled
from .usage_table import FIRST, MORE, OTHERS, PRODUCTS, Variant

#: float16 is bfloat16's program with other products: a test compares them.
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: Bytes of stack that ptxas may use where registers run out.
STACK = 64


class Sizes(NamedTuple):
    """Columns of queries and keys, of values, and of float32: of query points with the bias's rank, of value points."""

    c: int
    dv: int
    features: int
    points: int


PUBLISHED = Sizes(128, 128 + 2 * 32, 3 * 8 + 2, 3 * 12)
#: As many float32 columns as `supports` lets through.
WIDEST = PUBLISHED._replace(features=64, points=63)
#: What is compiled for: the first columns, points with them; the other columns; the first with the widest points.
PARTS = {"points": (PUBLISHED, True), "rest": (PUBLISHED, False), "widest": (WIDEST, True)}


def variants() -> Iterator[Variant]:
    """Everything that the dispatcher can choose: every tile with points; without, and with the widest, the first one.

    A part without points is the same kernel with some of it left out.
    """
    for dtype in ("bf16", "fp32"):
        for part in PARTS:
            for kernel in tiles.KERNELS:
                for arch, capability in CHIPS.items():
                    found = tiles.tiles_for(capability, kernel, TYPES[dtype], PARTS[part][0].features)
                    for tile in found if part == "points" else found[:1]:
                        first = tile is found[0]
                        yield Variant(
                            arch,
                            f"{dtype} {kernel} {part} {'x'.join(map(str, tile))}",
                            rank=OTHERS if not first else FIRST if part == "points" else MORE,
                            quick=first and (arch, dtype, kernel, part) == (90, "bf16", "forward", "points"),
                            stack=STACK,
                            compile=partial(code, arch, kernel, dtype, tile, *PARTS[part]),
                            faults=partial(faults, dtype),
                        )


def code(arch: int, kernel: str, dtype: str, tile: tiles.Tile, sizes: Sizes, points: bool) -> Any:
    """A kernel's code in a tile."""
    from foldkernels.kernels.factorized_point_attention._triton import KERNELS

    function = KERNELS[kernel]
    (of_c, c_chunks), (of_v, v_chunks) = tiles.chunks(sizes.c, tile), tiles.chunks(sizes.dv, tile)
    constants = {"C": sizes.c, "CW": of_c, "CHUNKS": c_chunks, "F": sizes.features, "FW": tiles.width(sizes.features)}
    constants |= {"DV": sizes.dv, "VW": of_v, "VCHUNKS": v_chunks, "PV": sizes.points}
    constants |= {"PW": tiles.width(sizes.points), "I": tile.queries, "J": tile.keys, "POINTS": points}
    constants |= {"PRECISION": "ieee", "WIDE_PRECISION": "ieee" if dtype == "fp32" else "tf32x3", "INTERPRETED": False}
    types = dict.fromkeys(("q", "k", "v", "d_out", "d_q", "d_k", "d_v"), f"*{dtype}")
    wide = "qf kf kb vf out out_f lse delta d_points d_qf d_kf d_kb d_vf".split()
    types |= {**dict.fromkeys(wide, "*fp32"), "ends": "*i32", "scale": "fp32"}
    # Pointers and the strides of 16-bit data are multiples of 16; those of 26 or 36 columns are not.
    odd_strides = tuple(f"{name}_" for name in wide)
    odd = ("heads", "n", "first", "scale", *(x for x in function.arg_names if x.startswith(odd_strides)))
    return compiled(arch, function, types, constants, odd, warps=tile.warps, stages=tile.stages)


def faults(dtype: str, found: Any) -> list[str]:
    """16 bits and their points belong on the tensor cores; float32 is never rounded to tf32."""
    there, split = bool(re.search(PRODUCTS, found.asm["ptx"])), "tf32" in found.asm["ptx"]
    half = dtype != "fp32"
    said = [] if there == half else ["the products are not where they should be"]
    return said if split == half else [*said, "products are rounded to tf32, or should be split into three of it"]
