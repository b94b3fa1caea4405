"""What each variant of a Triton kernel takes of each chip, written down and held: one table an operation.

    python -m tests.support.usage_table edge_transition      compiles what is not written down, and adds it
    python -m tests.support.usage_table                      of every operation

A variant is one tile of one kernel for one set of types and constants on one chip: everything that a launcher may ask
for. It has a rank: `FIRST`, what is taken unmeasured in the usual types; `MORE`, the same tiles in the other types and
ways; `OTHERS`, tiles that are taken only where they were measured to be faster. What ranks lower is compiled first, and
for each chip the table says up to which rank it is whole ("held"): there, rows may neither be missing nor be too many.
What is not written down is held to the chip's limits and our own.

Rows that nobody asks for any more are left out when a table is written. Remove the file to write all of it again, as
after a change of a kernel; with TRITON_CACHE_DIR set, what was compiled before is not compiled again.
"""

import importlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from foldkernels.kernels.triton_tools import gpu_limits

from .triton_tools import CHIPS, Usage, usage

TABLES = Path(__file__).parents[1] / "goldens" / "triton"
#: Operation -> the module beside this one with its `variants`.
MODULES = {
    "attention with a dense bias": "biased_code",
    "edge_transition": "edge_code",
    "factorized_point_attention": "factorized_code",
    "invariant_point_attention": "ipa_compiled",
}
#: With another version of Triton than that which was written down, the stack may be larger by so many bytes.
ALLOWANCE = 64
#: Products on the tensor cores, as they stand in a chip's assembly.
PRODUCTS = r"mma\.(?:m16n8|sync)|wgmma\.mma_async|tcgen05\.mma"


FIRST, MORE, OTHERS = range(3)
#: What a table has beside its rows.
HEADS = ("triton", "held")


class Variant(NamedTuple):
    """Something to compile.

    Attributes:
        arch: The chip, as 90.
        name: What it is, without the chip.
        rank: `FIRST`, `MORE` or `OTHERS`.
        quick: Whether every run of the tests compiles it.
        stack: What it may spill at most, in bytes a thread, whatever was written down.
        compile: Gives the code.
        faults: What is wrong with given code, beside what it takes.
    """

    arch: int
    name: str
    rank: int
    quick: bool
    stack: int
    compile: Callable[[], Any]
    faults: Callable[[Any], list[str]]

    def __str__(self) -> str:
        return f"sm_{self.arch} {self.name}"


Table = dict[str, Any]


def variants(operation: str) -> list[Variant]:
    """Everything that the dispatcher can choose."""
    return list(importlib.import_module(f"{__package__}.{MODULES[operation]}").variants())


def path(operation: str) -> Path:
    """Where an operation's table is."""
    return TABLES / f"{operation.replace(' ', '_')}.json"


def read(operation: str) -> Table:
    """An operation's table.

    Returns:
        The version of Triton ("triton"), the rank that each chip is held up to ("held"), and for each variant shared
        memory, registers and stack.
    """
    if not path(operation).exists():
        return {"triton": "", "held": {}}
    found: Table = json.loads(path(operation).read_text())
    return found


def too_much(variant: Variant, found: Usage, table: Table, version: str) -> list[str]:
    """In what a variant takes more than the chip has, than it may, and than was written down.

    Args:
        variant: What was compiled.
        found: What it takes.
        table: The operation's.
        version: Of Triton.
    """
    limit = gpu_limits.shared_memory(CHIPS[variant.arch])
    said = []
    if found.shared > limit:
        said.append(f"{found.shared} bytes of shared memory, and the chip has {limit}")
    if found.stack > variant.stack:
        said.append(f"{found.stack} bytes of stack, where {variant.stack} are the limit")
    if str(variant) not in table:
        return said
    most = Usage(*table[str(variant)])
    same = table["triton"] == version
    if same and any(x > y for x, y in zip(found, most, strict=True)):
        said.append(f"{found}, where the table has {most}")
    if not same and found.stack > most.stack + ALLOWANCE:
        said.append(f"{found.stack} bytes of stack, where the table has {most.stack} with another Triton")
    return said


def hold(variant: Variant, table: Table, folder: Path) -> list[str]:
    """Compile a variant, and say what is wrong with it; `folder` is for files."""
    import triton

    code = variant.compile()
    found = usage(code, folder)
    print(variant, *found, flush=True)
    said = [*too_much(variant, found, table, triton.__version__), *variant.faults(code)]
    return [f"{variant}: {words}" for words in said]


def whole_up_to(every: list[Variant], table: Table) -> dict[str, int]:
    """For each chip the highest rank up to which no row is missing; chips without the first are left out."""
    missing = [x for x in every if str(x) not in table]
    found = {arch: min((x.rank for x in missing if x.arch == arch), default=OTHERS + 1) - 1 for arch in CHIPS}
    return {str(arch): rank for arch, rank in found.items() if rank >= FIRST}


def out_of_step(every: list[Variant], table: Table) -> list[str]:
    """What is missing in a table, and what nobody asks for."""
    names, held = [str(variant) for variant in every], table["held"]
    missing = [str(x) for x in every if x.rank <= held.get(str(x.arch), -1) and str(x) not in table]
    found = {
        "two variants of one name": [name for name, times in Counter(names).items() if times > 1],
        "not written down": missing,
        "no variants": sorted(table.keys() - {*HEADS, *names}),
    }
    return [f"{what}: {', '.join(which)}" for what, which in found.items() if which]


def write(operation: str) -> None:
    """Compile what is not written down yet, the lowest rank first, and add it to the table."""
    import triton

    every, table = variants(operation), read(operation)
    if table["triton"] != triton.__version__:
        table = {"triton": triton.__version__}
    left = sorted((x for x in every if str(x) not in table), key=lambda x: x.rank)
    with tempfile.TemporaryDirectory() as folder:
        for variant in [*left, None]:
            if variant is not None:
                table[str(variant)] = list(usage(variant.compile(), Path(folder)))
                print(variant, *table[str(variant)], file=sys.stderr, flush=True)
            table["held"] = whole_up_to(every, table)
            names = [*HEADS, *(str(x) for x in every if str(x) in table)]
            lines = [f"{json.dumps(name)}: {json.dumps(table[name])}" for name in names]
            path(operation).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    for operation in sys.argv[1:] or MODULES:
        write(operation)


if __name__ == "__main__":
    main()
