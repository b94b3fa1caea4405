"""Compiles invariant point attention's Triton kernels for chips that are not here."""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from foldkernels.kernels.invariant_point_attention import _tiles as tiles
from foldkernels.kernels.triton_tools import gpu_limits

from .triton_tools import CHIPS
from .triton_tools import compiled as compiled_for
from .usage_table import FIRST, MORE, OTHERS, Variant

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: How products may be rounded.
PRECISIONS = {"bf16": ("ieee",), "fp16": ("ieee",), "fp32": ("tf32x3", "tf32")}
#: Bytes of stack, by type and channels. float32's products are three of tf32 each: their parts do not all fit a
#: thread's registers.
STACK = {(tiles.HALF, 128): 128, (tiles.HALF, 256): 256, (tiles.EXACT, 128): 512, (tiles.EXACT, 256): 1024}


class Cell(NamedTuple):
    """One cell of the table of tiles, for one chip and type of z."""

    arch: int
    kernel: str
    dtype: str
    fused: bool
    heads: int
    channels: int
    #: How wide points beside half of the scalars are, where tiles are read through descriptors; else 0.
    described: int = 0

    @property
    def half(self) -> bool:
        """Whether z is in 16 bits."""
        return self.dtype != "fp32"

    def plans(self) -> list[tiles.Plan]:
        """The ways that it is run in; where both are possible, the other is another cell."""
        columns = tiles.FUSED_WIDTH if self.fused else tiles.FUSED_WIDTH + 1
        sizes = {"h": self.heads, "cz": self.channels, "d": columns, "dv": columns, "points": 0}
        if self.described:
            sizes |= {"d": self.described, "points": self.described}
        found = tiles.plans_for(CHIPS[self.arch], self.kernel, TYPES[self.dtype], **sizes)
        return [plan for plan in found if plan.fused == self.fused and plan.descriptors == bool(self.described)]


def cells() -> Iterator[Cell]:
    """The whole table."""
    for arch, capability in CHIPS.items():
        for (kernel, z, fused), found in tiles.TABLE[gpu_limits.shared_memory(capability)].items():
            for dtype in ("bf16", "fp16") if z == tiles.HALF else ("fp32",):
                for heads, channels in found:
                    yield Cell(arch, kernel, dtype, fused, heads, channels)
        if capability >= tiles.DESCRIPTORS:
            for dtype in ("bf16", "fp16"):
                for heads, channels, columns in tiles.DESCRIBED[gpu_limits.shared_memory(capability)]:
                    yield Cell(arch, tiles.FORWARD, dtype, tiles.FUSED, heads, channels, columns)


def variants() -> Iterator[Variant]:
    """Everything that the dispatcher can choose.

    With a mask over pairs in every tile; in the first one float16, whose gradients alone are another program than
    bfloat16's, and without a mask for the published heads and channels.
    """
    for cell in cells():
        plans = cell.plans()
        for precision in PRECISIONS[cell.dtype]:
            for plan in plans if cell.dtype != "fp16" else plans[:1]:
                yield variant(cell, plan, precision)
            if (cell.heads, cell.channels) == tiles.CELLS[0] and cell.dtype == "bf16":
                yield variant(cell, plans[0], precision, masked=False)


def variant(cell: Cell, plan: tiles.Plan, precision: str, *, masked: bool = True) -> Variant:
    """A cell in one of its tiles; the published size in bfloat16 on 9.0 is quick."""
    way = f"descriptors-{cell.described}" if cell.described else "fused" if cell.fused else "wide"
    tile = f"{plan.queries}x{plan.keys}x{plan.warps}x{plan.stages}"
    unmasked = "" if masked else "unmasked "
    published = (cell.arch, cell.dtype, cell.channels) == (90, "bf16", 128) and cell.described in (0, 32)
    first, usual = plan == cell.plans()[0], masked and (cell.dtype, precision) in (("bf16", "ieee"), ("fp32", "tf32x3"))
    return Variant(
        cell.arch,
        f"{cell.kernel} {cell.dtype} {precision} {way} {cell.heads} {cell.channels} {unmasked}{tile}",
        rank=OTHERS if cell.described or not first else FIRST if usual else MORE,
        quick=first and masked and cell.fused and published,
        stack=STACK[tiles.HALF if cell.half else tiles.EXACT, cell.channels],
        compile=partial(compiled, cell, plan, precision, masked=masked),
        faults=not_ahead if cell.described else partial(faults, cell),
    )


def compiled(cell: Cell, plan: tiles.Plan, precision: str, *, masked: bool = True, ones: tuple[str, ...] = ()) -> Any:
    """A cell's code in one of its tiles, at the largest sizes that take it.

    Args:
        cell: Which.
        plan: The tile.
        precision: Of products.
        masked: With a mask over pairs.
        ones: Names of integer arguments that are 1, which Triton compiles for.
    """
    if cell.described:
        return _described(cell, plan, masked=masked, ones=ones)
    from foldkernels.kernels.invariant_point_attention._triton import KERNELS

    columns = tiles.FUSED_WIDTH if cell.fused else tiles.FUSED_WIDTH + 1
    constants: dict[str, Any] = {
        "H": cell.heads, "HW": plan.heads,
        "CZ": cell.channels, "CZW": cell.channels // plan.chunks, "CHUNKS": plan.chunks,
        "D": columns, "DW": tiles.width(columns), "DV": columns, "DVW": tiles.width(columns),
        "I": plan.queries, "J": plan.keys, "TERMS": 2 if cell.half else 1, "NEVER": -1e30, "FUSED": plan.fused,
        "MASKED": masked, "PRECISION": precision, "INTERPRETED": False, **dict.fromkeys(ones, 1),
    }  # fmt: skip
    function = KERNELS[cell.kernel]
    names = function.arg_names
    counts = ("items", "n", "blocks_a_part")
    numbers = (*counts, "padded", "z_b", "z_i", "z_j", "m_b", "m_i", "m_j")
    types = dict.fromkeys(names, "*fp32") | dict.fromkeys(numbers, "i32")
    types |= dict.fromkeys(("z", "weight", "joined", "d_z"), f"*{cell.dtype}")
    if cell.half:
        types |= dict.fromkeys(("q", "k", "v", "d_out", "weights"), "*fp16") | {"d_logits": "*bf16"}
    types |= {"pair_mask": "*i1", "there": "*i1"}
    # Pointers, z's strides and the padded number of keys are multiples of 16; sizes are anything.
    odd = (*counts, *(name for name in numbers if name.startswith("m_")))
    return compiled_for(cell.arch, function, types, constants, odd, warps=plan.warps, stages=plan.stages)


def _described(cell: Cell, plan: tiles.Plan, *, masked: bool, ones: tuple[str, ...]) -> Any:
    """The same of the kernel that reads tiles through descriptors."""
    from foldkernels.kernels.invariant_point_attention._tma_triton import forward_kernel

    columns = tiles.FUSED_WIDTH
    constants: dict[str, Any] = {
        "H": cell.heads, "HW": plan.heads, "CZ": cell.channels, "CZW": cell.channels,
        "PW": cell.described, "DV": columns, "DVW": columns,
        "I": plan.queries, "J": plan.keys, "NEVER": -1e30,
        "MASKED": masked, "INTERPRETED": False, **dict.fromkeys(ones, 1),
    }  # fmt: skip
    tile = {
        "z": f"{cell.dtype}[1, {plan.queries}, {plan.keys}, {cell.channels}]",
        "k": f"fp16[1, {plan.heads}, {plan.keys}, {cell.described}]",
        "v": f"fp16[1, {plan.heads}, {plan.keys}, {columns}]",
    }
    types = {"weight": f"*{cell.dtype}", "q": "*fp16", "pair_mask": "*i1", "there": "*i1"}
    types |= dict.fromkeys(("q_scale", "key_bias", "out", "pair", "lse"), "*fp32")
    types |= {name: f"tensordesc<{x}>" for name, x in tile.items()}
    odd = ("items", "n", "blocks_a_part", "m_b", "m_i", "m_j", *tile)
    return compiled_for(cell.arch, forward_kernel, types, constants, odd, warps=plan.warps, stages=plan.stages)


def not_ahead(code: Any) -> list[str]:
    """What of z, both terms of the keys and the values the copy engine does not bring ahead, into two buffers each."""
    ttgir, ptx = code.asm["ttgir"], code.asm["ptx"]
    said = [] if "mma.sync" in ptx else ["no product is on the tensor cores"]
    for name in ("z_tile", "k_high", "k_low", "v_tile"):
        if not re.search(rf"%{name}\w* = ttg\.local_alloc : \(\) -> !ttg\.memdesc<2x", ttgir):
            said.append(f"{name} has not two buffers")
        if re.search(rf"%{name}\w* = (tt\.load|ttg\.async_copy)", ttgir):
            said.append(f"{name} is loaded by pointers")
    body = ttgir[ttgir.index("scf.for") :]
    copies = body[: body.index("scf.yield")].count("ttng.async_tma_copy_global_to_local")
    # Four for each of the first two tiles, and four in the loop.
    started = len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.\S*mbarrier", ptx))
    if copies != 4 or started < 12 or "mbarrier.try_wait" not in ptx:
        said.append(f"the copy engine is asked {copies} times in the loop and {started} in all")
    return said


def faults(cell: Cell, code: Any) -> list[str]:
    """Products belong on the tensor cores, and z is loaded once."""
    said = [] if "mma.sync" in code.asm["ptx"] else ["no product is on the tensor cores"]
    if ("tf32" in code.asm["ptx"]) == cell.half:
        said.append("products are rounded to tf32, or should be")
    # One load in the loop for each chunk of z's channels. 16-bit tiles are on their way to memory before their turn.
    # float32's are not: their split into three products stands between the load and its use, and one product of tf32
    # wants z along its channels and the other along its keys, each in another layout of shared memory.
    waits = re.findall(r"%(z_tile|z_more)\w* = tt\.load ", code.asm["ttgir"])
    ahead = re.findall(r"%(z_tile|z_more)\w* = ttg\.async_copy_global_to_local ", code.asm["ttgir"])
    chunks = ["z_tile", "z_more"][: cell.channels // tiles.CHUNK]
    right = not waits and set(ahead) == set(chunks) if cell.half else waits == chunks and not ahead
    return said if right else [*said, f"z is loaded otherwise: waiting {waits}, ahead {ahead}"]
