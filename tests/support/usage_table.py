"""What each variant of a Triton kernel takes of each chip, written down and held: one table an operation.

    python -m tests.support.usage_table edge_transition      compiles what is not written down, and adds it
    python -m tests.support.usage_table                      of every operation

A variant is one tile of one kernel for one set of types and constants on one chip: everything that a launcher may ask
for. What is taken unmeasured must be written down, and other tiles for the chips of `EVERY_TILE`; the rest are held to
the chip's and our own limits alone. Rows that nobody asks for any more are left out when a table is written. Remove the
file to write all of it again, as after a change of a kernel; with TRITON_CACHE_DIR set, what was compiled before is not
compiled again.
"""

import importlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from foldkernels.kernels import chips

from .triton_tools import CHIPS, Usage, usage

TABLES = Path(__file__).parents[1] / "goldens" / "triton"
#: Operation -> the module beside this one with its `variants`.
MODULES = {
    "attention with a dense bias": "biased_code",
    "edge_transition": "edge_code",
    "factorized_point_attention": "factorized_code",
    "invariant_point_attention": "ipa_compiled",
}
#: Operation -> chips for which tiles that are not taken unmeasured are written down, too.
EVERY_TILE: Mapping[str, Collection[int]] = {
    "attention with a dense bias": (),
    "edge_transition": (80, 89, 90, 100),
    "factorized_point_attention": (),
    "invariant_point_attention": (80,),
}
#: With another version of Triton than that which was written down, the stack may be larger by so many bytes.
ALLOWANCE = 64
#: Products on the tensor cores, as they stand in a chip's assembly.
PRODUCTS = r"mma\.(?:m16n8|sync)|wgmma\.mma_async|tcgen05\.mma"


class Variant(NamedTuple):
    """Something to compile.

    Attributes:
        arch: The chip, as 90.
        name: What it is, without the chip.
        first: Whether it is taken unmeasured.
        quick: Whether every run of the tests compiles it.
        stack: What it may spill at most, in bytes a thread, whatever was written down.
        compile: Gives the code.
        faults: What is wrong with given code, beside what it takes.
    """

    arch: int
    name: str
    first: bool
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


def required(operation: str, variant: Variant) -> bool:
    """Whether it must be written down."""
    return variant.first or variant.arch in EVERY_TILE[operation]


def path(operation: str) -> Path:
    """Where an operation's table is."""
    return TABLES / f"{operation.replace(' ', '_')}.json"


def read(operation: str) -> Table:
    """An operation's table: the version of Triton, and for each variant shared memory, registers and stack."""
    if not path(operation).exists():
        return {}
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
    limit = chips.shared_memory(CHIPS[variant.arch])
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


def out_of_step(operation: str, every: list[Variant], table: Table) -> list[str]:
    """What is missing in an operation's table, and what nobody asks for."""
    names = [str(variant) for variant in every]
    found = {
        "two variants of one name": [name for name, times in Counter(names).items() if times > 1],
        "not written down": [str(x) for x in every if required(operation, x) and str(x) not in table],
        "no variants": sorted(table.keys() - {"triton", *names}),
    }
    return [f"{what}: {', '.join(which)}" for what, which in found.items() if which]


#: Chips whose other tiles are written down first: those of clusters.
_SOONER = (90, 80)


def write(operation: str) -> None:
    """Compile what is not written down yet, first what is taken unmeasured, and add it to the table."""
    import triton

    every, table = variants(operation), read(operation)
    if table.get("triton") != triton.__version__:
        table = {"triton": triton.__version__}
    left = [variant for variant in every if str(variant) not in table]
    left.sort(key=lambda x: (not x.first, x.arch not in _SOONER))
    with tempfile.TemporaryDirectory() as folder:
        for variant in [*left, None]:
            if variant is not None:
                table[str(variant)] = list(usage(variant.compile(), Path(folder)))
                print(variant, *table[str(variant)], file=sys.stderr, flush=True)
            names = ["triton", *(str(x) for x in every if str(x) in table)]
            lines = [f"{json.dumps(name)}: {json.dumps(table[name])}" for name in names]
            path(operation).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    for operation in sys.argv[1:] or MODULES:
        write(operation)


if __name__ == "__main__":
    main()
