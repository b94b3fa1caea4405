"""Compiles the Triton attention with a dense bias ahead of time."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from foldkernels.kernels import _biased_attention_tiles as tiles

from .triton_tools import CHIPS
from .usage_table import Variant

TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WIDTHS = (16, 32, 64, 128)


def variants() -> Iterator[Variant]:
    """Everything that the dispatcher can choose."""
    for dtype, precision in (("bf16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")):
        for d in WIDTHS:
            for kernel in tiles.KERNELS:
                for arch, capability in CHIPS.items():
                    found = tiles.tiles_for(capability, kernel, TYPES[dtype], d)
                    for tile in found:
                        name = f"{dtype} {precision} {d} {kernel} {'x'.join(map(str, tile))}"
                        quick = (dtype, d, arch) == ("bf16", 32, 90) and tile is found[0]
                        first = tile is found[0] and precision == "ieee"
                        code = partial(of_chip, arch, kernel, dtype, d, tile, precision)
                        yield Variant(arch, name, first, quick, code)


def of_chip(arch: int, kernel: str, dtype: str, d: int, tile: tiles.Tile, precision: str = "ieee") -> Any:
    """A kernel's code for one of NVIDIA's chips."""
    from triton.backends.compiler import GPUTarget

    return compiled(GPUTarget("cuda", arch, 32), kernel, dtype, d, tile, precision)


def compiled(target: Any, kernel: str, dtype: str, d: int, tile: tiles.Tile, precision: str = "ieee") -> Any:
    """A kernel's code in a tile, the bias in float32 (the larger case)."""
    import triton
    from triton.compiler import ASTSource

    from foldkernels.kernels import _biased_attention_backward_triton  # noqa: F401 - adds its kernels
    from foldkernels.kernels._biased_attention_triton import KERNELS

    function = KERNELS[kernel]
    constants = {"D": d, "WIDTH": tiles.width(d), "I": tile.queries, "J": tile.keys, "MASKED": True}
    constants |= {"PRECISION": precision, "INTERPRETED": False} | ({"WITH_BIAS": True} if kernel == "queries" else {})
    data = dict.fromkeys(("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v"), f"*{dtype}")
    wide = dict.fromkeys(("bias", "reach", "lse", "delta", "d_bias"), "*fp32")
    sizes = dict.fromkeys(("heads", "rows", "queries", "keys", "items", "some_rows"), "i32")
    types = {**data, **wide, **sizes, "scale": "fp32", **dict.fromkeys(constants, "constexpr")}
    names = function.arg_names
    # Pointers, strides and the padded number of keys are multiples of 16; sizes are anything.
    whole = [i for i, name in enumerate(names) if name not in sizes and name not in constants and name != "scale"]
    source = ASTSource(
        function,
        {name: types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in whole},
    )
    return triton.compile(source, target=target, options={"num_warps": tile.warps, "num_stages": tile.stages})
