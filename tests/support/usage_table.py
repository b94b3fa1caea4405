"""What each variant of a Triton kernel takes of each chip, written down and held: one table an operation.

    python -m tests.support.usage_table edge_transition      compiles every variant, and writes the table again

A variant is one tile of one kernel in one type on one chip: everything that the dispatcher can choose, at the widths
that take most.
"""

import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from foldkernels.kernels import chips

from .triton_tools import CHIPS, Usage, usage

TABLES = Path(__file__).parents[1] / "goldens" / "triton"
#: Operation -> the module beside this one with its `VARIANTS`.
MODULES = {
    "attention with a dense bias": "biased_code",
    "edge_transition": "edge_code",
    "factorized_point_attention": "factorized_code",
    "invariant_point_attention": "ipa_compiled",
}
#: With another version of Triton than that which was written down, the stack may be larger by so many bytes.
ALLOWANCE = 64


class Variant(NamedTuple):
    """Something to compile.

    Attributes:
        arch: The chip, as 90.
        name: What it is, without the chip.
        quick: Whether every run of the tests compiles it.
        compile: Gives the code.
    """

    arch: int
    name: str
    quick: bool
    compile: Callable[[], Any]

    def __str__(self) -> str:
        return f"sm_{self.arch} {self.name}"


def cases(variants: Iterable[Variant]) -> list[Any]:
    """Parameters of a test, most of them slow."""
    marks = {True: (), False: (pytest.mark.slow,)}
    return [pytest.param(variant, id=str(variant), marks=marks[variant.quick]) for variant in variants]


def path(operation: str) -> Path:
    """Where an operation's table is."""
    return TABLES / f"{operation.replace(' ', '_')}.json"


def read(operation: str) -> dict[str, Any]:
    """An operation's table: the version of Triton, and for each variant shared memory, registers and stack."""
    found: dict[str, Any] = json.loads(path(operation).read_text())
    return found


def hold(operation: str, variant: Variant, code: Any, folder: Path) -> Usage:
    """Assert that code asks for no more than the chip has, and than was written down."""
    import triton

    found, committed = usage(code, folder), read(operation)
    shared, registers, stack = committed[str(variant)]
    assert found.shared <= chips.shared_memory(CHIPS[variant.arch])
    if committed["triton"] == triton.__version__:
        assert found.shared <= shared and found.registers <= registers and found.stack <= stack, found
    assert found.stack <= stack + ALLOWANCE, found
    return found


def write(operation: str, variants: Iterable[Variant]) -> None:
    """Compile every variant, and write the table."""
    import triton

    table: dict[str, Any] = {"triton": triton.__version__}
    with tempfile.TemporaryDirectory() as folder:
        for variant in variants:
            try:
                table[str(variant)] = list(usage(variant.compile(), Path(folder)))
            except Exception as error:
                table[str(variant)] = str(error)[:200]
            print(variant, table[str(variant)], file=sys.stderr, flush=True)
            lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in table.items()]
            path(operation).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    for operation in sys.argv[1:] or MODULES:
        write(operation, importlib.import_module(f"{__package__}.{MODULES[operation]}").variants())


if __name__ == "__main__":
    main()
