"""Compiles the Triton edge transition ahead of time, at the published widths."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from foldkernels.kernels.edge_transition import _tiles as tiles

from .triton_tools import CHIPS
from .usage_table import Variant

TYPES = ("bf16", "fp16")
#: Multiflow's: pairs, residues' share, new pairs.
PUBLISHED = (128, 128, 128)


def variants() -> Iterator[Variant]:
    """Everything that the dispatcher can choose."""
    for dtype in TYPES:
        for kernel in tiles.KERNELS:
            for arch, capability in CHIPS.items():
                found = tiles.tiles_for(capability, kernel)
                for tile in found:
                    name = f"{dtype} {kernel} {'x'.join(map(str, tile))}"
                    quick = (dtype, arch) == ("bf16", 90) and tile is found[0]
                    code = partial(compiled, arch, kernel, dtype, tile=tile)
                    yield Variant(arch, name, tile is found[0], quick, code)


def compiled(
    arch: int,
    kernel: str,
    dtype: str,
    sizes: tuple[int, int, int] = PUBLISHED,
    tile: tiles.Tile | None = None,
    precision: str = "ieee",
) -> Any:
    """A kernel's code for a chip, in a tile, or in the first one."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from foldkernels.kernels.edge_transition._kernels import KERNELS

    function, wide = KERNELS[kernel], tiles.widths(*sizes)
    tile = tile or tiles.tiles_for(CHIPS[arch], kernel)[0]
    constants: dict[str, Any] = {
        "CZ": sizes[0], "C_OUT": sizes[2], "Z": wide.z, "OUT": wide.out, "PART": wide.part, "PARTS": wide.parts,
        "I": tile.rows, "J": tile.columns, "BLOCK": min(tile.block, wide.part), "MASKED": True,
        "BACKWARD": kernel == "hidden", "PRECISION": precision, "INTERPRETED": False,
    }  # fmt: skip
    names = function.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    wide_ones = "there_ first_i first_j b_second last_i last_j norm_weight norm_bias d_norm_weight d_norm_bias".split()
    numbers = {"first": "i32", "last": "i32", "n": "i32", "eps": "fp32"}
    strides = [name for name in names if name.endswith(("_i", "_j")) and not name.startswith(("first_", "last_"))]
    types = {
        **dict.fromkeys(names, f"*{dtype}"),
        **dict.fromkeys((name for name in wide_ones if name in names), "*fp32"),
        **dict.fromkeys(strides, "i32"),
        **{name: kind for name, kind in numbers.items() if name in names},
        **dict.fromkeys(constants, "constexpr"),
    }
    # Pointers and strides are multiples of 16; sizes are anything.
    whole = [i for i, name in enumerate(names) if name not in numbers and name not in constants]
    source = ASTSource(
        function,
        types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in whole},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
