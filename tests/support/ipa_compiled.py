"""Compiles invariant point attention's Triton kernels for chips that are not here."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from foldkernels.kernels import chips
from foldkernels.kernels.invariant_point_attention import _tiles as tiles

from .triton_tools import CHIPS
from .usage_table import Variant

TYPES = {tiles.HALF: "bf16", tiles.EXACT: "fp32"}


class Cell(NamedTuple):
    """One cell of the table of tiles, for one chip."""

    arch: int
    kernel: str
    z: str
    fused: bool
    heads: int
    channels: int
    described: int = 0
    """How wide half of the scalars and the points are, where tiles are read through descriptors; else 0."""

    def plans(self) -> list[tiles.Plan]:
        """The ways that it is run in; where both are possible, the other is another cell."""
        dtype = torch.bfloat16 if self.z == tiles.HALF else torch.float32
        columns = tiles.FUSED_WIDTH if self.fused else tiles.FUSED_WIDTH + 1
        sizes = {"h": self.heads, "cz": self.channels, "d": columns, "dv": columns, "points": 0}
        if self.described:
            sizes |= {"d": self.described, "points": self.described, "dv": tiles.FUSED_WIDTH}
        found = tiles.plans_for(CHIPS[self.arch], self.kernel, dtype, **sizes)
        return [plan for plan in found if plan.fused == self.fused and plan.descriptors == bool(self.described)]


def cells() -> Iterator[Cell]:
    """The whole table."""
    for arch, capability in CHIPS.items():
        for (kernel, z, fused), found in tiles.TABLE[chips.shared_memory(capability)].items():
            for heads, channels in found:
                yield Cell(arch, kernel, z, fused, heads, channels)
        if capability >= tiles.DESCRIPTORS:
            for heads, channels, columns in tiles.DESCRIBED[chips.shared_memory(capability)]:
                yield Cell(arch, tiles.FORWARD, tiles.HALF, tiles.FUSED, heads, channels, columns)


def precisions(z: str) -> tuple[str, ...]:
    """How its products may be rounded."""
    return ("ieee",) if z == tiles.HALF else ("tf32x3", "tf32")


def variants() -> Iterator[Variant]:
    """Everything that the dispatcher can choose."""
    for cell in cells():
        for precision in precisions(cell.z):
            for plan in cell.plans():
                yield variant(cell, plan, precision)


def variant(cell: Cell, plan: tiles.Plan, precision: str) -> Variant:
    """A cell in one of its tiles; the published size on two chips is quick."""
    way = f"descriptors-{cell.described}" if cell.described else "fused" if cell.fused else "wide"
    tile = f"{plan.queries}x{plan.keys}x{plan.warps}x{plan.stages}"
    name = f"{cell.kernel} {TYPES[cell.z]} {precision} {way} {cell.heads} {cell.channels} {tile}"
    quick = cell.arch in (80, 90) and cell.fused and plan == cell.plans()[0]
    # Those with descriptors are taken where they were measured to be faster, but written down all the same.
    first = plan == cell.plans()[0] and precision != "tf32"
    return Variant(cell.arch, name, first, quick, partial(compiled, cell, plan, precision))


def compiled(cell: Cell, plan: tiles.Plan, precision: str, *, masked: bool = True, ones: tuple[str, ...] = ()) -> Any:
    """A cell's code in one of its tiles, at the largest sizes that take it.

    Args:
        cell: Which.
        plan: The tile.
        precision: Of products.
        masked: With a mask over pairs, which takes more registers.
        ones: Names of integer arguments that are 1, which Triton compiles for.
    """
    if cell.described:
        return _described(cell, plan, masked=masked, ones=ones)
    from foldkernels.kernels.invariant_point_attention._triton import KERNELS

    columns = tiles.FUSED_WIDTH if cell.fused else tiles.FUSED_WIDTH + 1
    half = cell.z == tiles.HALF
    constants: dict[str, Any] = {
        "H": cell.heads, "HW": plan.heads,
        "CZ": cell.channels, "CZW": cell.channels // plan.chunks, "CHUNKS": plan.chunks,
        "D": columns, "DW": tiles.width(columns), "DV": columns, "DVW": tiles.width(columns),
        "I": plan.queries, "J": plan.keys, "TERMS": 2 if half else 1, "NEVER": -1e30, "FUSED": plan.fused,
        "MASKED": masked, "PRECISION": precision, "INTERPRETED": False,
    }  # fmt: skip
    z, packed = f"*{TYPES[cell.z]}", "*fp16" if half else "*fp32"
    types = dict.fromkeys(("z", "weight", "joined", "d_z"), z)
    types |= dict.fromkeys(("q", "k", "v", "d_out", "weights"), packed)
    return _compile(KERNELS[cell.kernel], cell.arch, plan, types | {"d_logits": z}, constants, ones)


def _described(cell: Cell, plan: tiles.Plan, *, masked: bool, ones: tuple[str, ...]) -> Any:
    """The kernel that reads tiles through descriptors."""
    from foldkernels.kernels.invariant_point_attention._triton_descriptors import forward_kernel

    columns = tiles.FUSED_WIDTH
    constants: dict[str, Any] = {
        "H": cell.heads, "HW": plan.heads, "CZ": cell.channels, "CZW": cell.channels,
        "PW": cell.described, "DV": columns, "DVW": columns,
        "I": plan.queries, "J": plan.keys, "NEVER": -1e30, "MASKED": masked, "INTERPRETED": False,
    }  # fmt: skip
    z = TYPES[cell.z]
    types = {
        "z": f"tensordesc<{z}[1, {plan.queries}, {plan.keys}, {cell.channels}]>",
        "k": f"tensordesc<fp16[1, {plan.heads}, {plan.keys}, {cell.described}]>",
        "v": f"tensordesc<fp16[1, {plan.heads}, {plan.keys}, {columns}]>",
        "weight": f"*{z}",
        "q": "*fp16",
    }
    return _compile(forward_kernel, cell.arch, plan, types, constants, ones)


def _compile(
    function: Any,
    arch: int,
    plan: tiles.Plan,
    types: dict[str, str],
    constants: dict[str, Any],
    ones: tuple[str, ...],
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    types = {**types, "pair_mask": "*i1", "there": "*i1"}
    counts = ("items", "n", "blocks_a_part")
    numbers = (*counts, "padded", "z_b", "z_i", "z_j", "m_b", "m_i", "m_j")
    types |= dict.fromkeys(numbers, "i32")
    types |= dict.fromkeys((*constants, *ones), "constexpr")
    values = {**constants, **dict.fromkeys(ones, 1)}
    # Pointers, z's strides and the padded number of keys are multiples of 16; sizes are anything.
    whole = [
        i
        for i, x in enumerate(names)
        if x not in values and x not in counts and not x.startswith("m_") and "tensordesc" not in types.get(x, "")
    ]
    source = ASTSource(
        function,
        {name: types.get(name, "*fp32") for name in names},
        constexprs={(names.index(name),): value for name, value in values.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in whole},
    )
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options={"num_warps": plan.warps, "num_stages": plan.stages})
