"""Compiles invariant point attention's Triton kernels for chips that are not here.

Run as a module, `python -m tests.support.ipa_compiled`, it writes down what each variant takes of each chip.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from foldkernels.kernels import chips
from foldkernels.kernels.invariant_point_attention import _tiles as tiles

from .triton_tools import CHIPS, usage

USAGE = Path(__file__).parents[1] / "goldens" / "triton" / "ipa_usage.json"
TYPES = {tiles.HALF: "bf16", tiles.EXACT: "fp32"}


class Variant(NamedTuple):
    """One cell of the table of tiles, for one chip."""

    arch: int
    kernel: str
    z: str
    fused: bool
    heads: int
    channels: int

    def __str__(self) -> str:
        way = "fused" if self.fused else "wide"
        return f"sm_{self.arch} {self.kernel} {TYPES[self.z]} {way} {self.heads} {self.channels}"


def variants() -> Iterator[Variant]:
    """Everything that the dispatcher can choose."""
    for arch, capability in CHIPS.items():
        for (kernel, z, fused), cells in tiles.TABLE[chips.shared_memory(capability)].items():
            for heads, channels in cells:
                yield Variant(arch, kernel, z, fused, heads, channels)


def compiled(variant: Variant, *, masked: bool = True, ones: tuple[str, ...] = ()) -> Any:
    """A variant's code, at the largest sizes that take it.

    Args:
        variant: Which.
        masked: With a mask over pairs, which takes more registers.
        ones: Names of integer arguments that are 1, which Triton compiles for.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from foldkernels.kernels.invariant_point_attention._triton import KERNELS

    dtype = torch.bfloat16 if variant.z == tiles.HALF else torch.float32
    columns = tiles.FUSED_WIDTH if variant.fused else tiles.FUSED_WIDTH + 1
    sizes = {"h": variant.heads, "cz": variant.channels, "d": columns, "dv": columns}
    plan = tiles.plans_for(CHIPS[variant.arch], variant.kernel, dtype, **sizes)[0]
    assert plan.fused == variant.fused and plan.heads == variant.heads
    half = variant.z == tiles.HALF
    constants: dict[str, Any] = {
        "H": variant.heads, "HW": plan.heads,
        "CZ": variant.channels, "CZW": variant.channels // plan.chunks, "CHUNKS": plan.chunks,
        "D": columns, "DW": tiles.width(columns), "DV": columns, "DVW": tiles.width(columns),
        "I": plan.queries, "J": plan.keys, "TERMS": 2 if half else 1, "NEVER": -1e30, "FUSED": plan.fused,
        "MASKED": masked, "PRECISION": "ieee" if half else "tf32x3", "INTERPRETED": False,
    }  # fmt: skip
    function = KERNELS[variant.kernel]
    names = function.arg_names
    z, packed = f"*{TYPES[variant.z]}", "*fp16" if half else "*fp32"
    types = dict.fromkeys(("z", "weight", "joined", "d_z"), z)
    types |= dict.fromkeys(("q", "k", "v", "d_out", "weights"), packed)
    types |= {"d_logits": z, "pair_mask": "*i1", "there": "*i1"}
    counts = ("items", "n", "blocks_a_part")
    numbers = (*counts, "padded", "z_b", "z_i", "z_j", "m_b", "m_i", "m_j")
    types |= dict.fromkeys(numbers, "i32")
    types |= dict.fromkeys((*constants, *ones), "constexpr")
    values = {**constants, **dict.fromkeys(ones, 1)}
    # Pointers, z's strides and the padded number of keys are multiples of 16; sizes are anything.
    whole = [i for i, x in enumerate(names) if x not in values and x not in counts and not x.startswith("m_")]
    source = ASTSource(
        function,
        {name: types.get(name, "*fp32") for name in names},
        constexprs={(names.index(name),): value for name, value in values.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in whole},
    )
    target = GPUTarget("cuda", variant.arch, 32)
    return triton.compile(source, target=target, options={"num_warps": plan.warps, "num_stages": plan.stages})


def main() -> None:
    import triton

    found: dict[str, Any] = {"triton": triton.__version__}
    with tempfile.TemporaryDirectory() as folder:
        for variant in variants():
            found[str(variant)] = usage(compiled(variant), Path(folder))
            print(variant, *found[str(variant)], file=sys.stderr, flush=True)
    USAGE.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items()]
    USAGE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
