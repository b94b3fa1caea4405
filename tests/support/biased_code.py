"""Compiles the Triton attention with a dense bias ahead of time."""

import re
from collections.abc import Iterator
from functools import partial
from math import gcd
from typing import Any, NamedTuple

import torch

from foldkernels.kernels.biased_attention import _tiles as tiles

from .triton_tools import CHIPS, compiled
from .usage_table import FIRST, MORE, OTHERS, PRODUCTS, Variant

#: float16 is bfloat16's program with other products: a test compares them.
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRECISIONS = {"bf16": ("ieee",), "fp32": ("ieee", "tf32")}
#: AlphaFold 3's heads, which fill no tile, and whose strides are no multiples of 16.
ODD = 24
#: The published size, which is compiled without a mask, too.
PUBLISHED = 32
#: Bytes of stack that ptxas may use where registers run out: in a tile that is taken unmeasured, and in another one.
#: float32's half of a forward tile with heads of 128 runs in half the warps, and takes most of it.
STACK, OTHER_STACK = 64, 384


class Way(NamedTuple):
    """What a kernel is compiled for, beside its tile.

    Attributes:
        kernel: One of `tiles.KERNELS`.
        dtype: Of queries, keys and values.
        precision: Of products.
        d: The head size.
        masked: Whether some entries are no keys.
        alone: Whether one row alone uses the bias, so that the kernel `queries` writes its gradient.
    """

    kernel: str
    dtype: str
    precision: str
    d: int
    masked: bool = True
    alone: bool = False

    def __str__(self) -> str:
        words = (self.dtype, self.precision, str(self.d), self.kernel)
        return " ".join((*words, *("one-row",) * self.alone, *("unmasked",) * (not self.masked)))


def widths(arch: int, dtype: str) -> Iterator[int]:
    """Head sizes that fill their tiles: of those that share all tiles the widest, in bfloat16 the published one too."""
    of_width = tiles.TILES[tiles.chips(CHIPS[arch])][tiles.EXACT if dtype == "fp32" else tiles.HALF]
    widest = {found: d for d, found in sorted(of_width.items())}
    return (d for d in of_width if d in widest.values() or (d, dtype) == (PUBLISHED, "bf16"))


def ways(arch: int) -> Iterator[Way]:
    """Everything that a launcher may ask for on a chip."""
    for dtype, precisions in PRECISIONS.items():
        for precision in precisions:
            for d in (*widths(arch, dtype), *((ODD,) if dtype == "bf16" else ())):
                for kernel in tiles.KERNELS:
                    way = Way(kernel, dtype, precision, d)
                    yield way
                    if d == PUBLISHED and dtype == "bf16":
                        yield way._replace(masked=False)
                    if kernel == "queries":
                        yield way._replace(alone=True)


def variants() -> Iterator[Variant]:
    """Everything that the dispatcher can choose: in every tile, but without a mask and with odd heads in the first."""
    for arch, capability in CHIPS.items():
        for way in ways(arch):
            found = tiles.tiles_for(capability, way.kernel, TYPES[way.dtype], way.d)
            plain = way.d != ODD and way.masked
            for tile in found if plain else found[:1]:
                first, usual = tile is found[0], plain and not way.alone and way.precision == "ieee"
                yield Variant(
                    arch,
                    f"{way} {'x'.join(map(str, tile))}",
                    rank=OTHERS if not first else FIRST if usual else MORE,
                    quick=first and plain and (way.dtype, way.d, arch) == ("bf16", PUBLISHED, 90),
                    stack=STACK if first else OTHER_STACK,
                    compile=partial(code, arch, way, tile),
                    faults=partial(faults, way),
                )


def code(target: Any, way: Way, tile: tiles.Tile) -> Any:
    """A kernel's code in a tile, the bias in float32 (the larger case)."""
    from foldkernels.kernels.biased_attention import _triton_backward  # noqa: F401 - adds its kernels
    from foldkernels.kernels.biased_attention._triton_forward import KERNELS

    function = KERNELS[way.kernel]
    constants = {"D": way.d, "WIDTH": tiles.width(way.d), "I": tile.queries, "J": tile.keys, "MASKED": way.masked}
    constants["UNIT"] = gcd(16, way.d)
    constants |= {"PRECISION": way.precision, "INTERPRETED": False, "WITH_BIAS": way.alone}
    data = ("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v")
    types = dict.fromkeys(data, f"*{way.dtype}")
    types |= dict.fromkeys(("bias", "reach", "lse", "delta", "d_bias"), "*fp32") | {"scale": "fp32"}
    # Pointers and the padded number of keys are multiples of 16; strides are in units, and sizes are anything.
    whole = (*types, "padded_keys")
    odd = ("scale", *(name for name in function.arg_names if name not in whole))
    return compiled(target, function, types, constants, odd, warps=tile.warps, stages=tile.stages)


def faults(way: Way, found: Any) -> list[str]:
    """Products of 16 bits belong on the tensor cores, float32's are never rounded unasked, and loads are of vectors."""
    there, rounded = bool(re.search(PRODUCTS, found.asm["ptx"])), way.precision == "tf32"
    said = []
    if way.dtype != "fp32" and re.search(r"ld\.global\S*\.[bu]16", found.asm["ptx"]):
        said.append("16-bit numbers are loaded one by one")
    if there != (way.dtype != "fp32" or rounded):
        said.append("the products are not where they should be")
    if ("tf32" in found.asm["ptx"]) != rounded:
        said.append("products are rounded to tf32, or should be")
    return said
