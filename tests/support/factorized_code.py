"""Compiles the Triton factorised point attention ahead of time, at FlashIPA's published size."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from foldkernels.kernels.factorized_point_attention import _tiles as tiles

from .triton_tools import CHIPS
from .usage_table import Variant

TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def variants() -> Iterator[Variant]:
    """Everything that the dispatcher can choose: each kernel's first columns, points with them, and the others."""
    for dtype, points in ((dtype, points) for dtype in TYPES for points in (True, False)):
        for kernel in tiles.KERNELS:
            for arch, capability in CHIPS.items():
                found = tiles.tiles_for(capability, kernel, TYPES[dtype])
                for tile in found:
                    what = "points" if points else "rest"
                    name = f"{dtype} {kernel} {what} {'x'.join(map(str, tile))}"
                    quick = (arch, dtype, kernel, points) == (80, "bf16", "forward", True) and tile is found[0]
                    first, code = tile is found[0] and points, partial(compiled, arch, kernel, dtype, tile, points)
                    yield Variant(arch, name, first, quick, code)


def compiled(arch: int, kernel: str, dtype: str, tile: tiles.Tile, points: bool) -> Any:
    """A kernel's code in a tile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from foldkernels.kernels.factorized_point_attention._triton import KERNELS

    function = KERNELS[kernel]
    c, dv, features, points_of_values = 128, 128 + 2 * 32, 3 * 8 + 2, 3 * 12
    (of_c, c_chunks), (of_v, v_chunks) = tiles.chunks(c, tile), tiles.chunks(dv, tile)
    constants = {"C": c, "CW": of_c, "CHUNKS": c_chunks, "F": features, "FW": tiles.width(features)}
    constants |= {"DV": dv, "VW": of_v, "VCHUNKS": v_chunks, "PV": points_of_values}
    constants |= {"PW": tiles.width(points_of_values), "I": tile.queries, "J": tile.keys, "POINTS": points}
    constants |= {"PRECISION": "ieee", "WIDE_PRECISION": "ieee" if dtype == "fp32" else "tf32x3", "INTERPRETED": False}
    data = dict.fromkeys(("q", "k", "v", "d_out", "d_q", "d_k", "d_v"), f"*{dtype}")
    wide = "qf kf kb vf out out_f lse delta d_points d_qf d_kf d_kb d_vf".split()
    types = {**data, **dict.fromkeys(wide, "*fp32"), "ends": "*i32", "scale": "fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    names = function.arg_names
    # Pointers and the strides of 16-bit data are multiples of 16; those of 26 or 36 columns are not.
    odd = ("heads", "n", "first", "scale", *constants)
    odd_strides = tuple(f"{name}_" for name in (*wide, "d_points"))
    whole = [i for i, name in enumerate(names) if name not in odd and not name.startswith(odd_strides)]
    source = ASTSource(
        function,
        {name: types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in whole},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
