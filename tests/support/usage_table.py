"""What each variant of a Triton kernel takes of each chip, written down and held: one table an operation.

    python -m tests.support.usage_table edge_transition      compiles what is not written down, and adds it
    python -m tests.support.usage_table                      of every operation

A variant is one tile of one kernel in one type on one chip, at the widths that take most. What is taken unmeasured must
be written down; other tiles, which are taken only where they were measured to be faster, are held where they are.
Remove the file to write all of it again.
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
        first: Whether it is taken unmeasured.
        quick: Whether every run of the tests compiles it.
        compile: Gives the code.
    """

    arch: int
    name: str
    first: bool
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
    if not path(operation).exists():
        return {}
    found: dict[str, Any] = json.loads(path(operation).read_text())
    return found


def hold(operation: str, variant: Variant, code: Any, folder: Path, stack: int) -> Usage:
    """Assert that code asks for no more than the chip has, and than was written down.

    Args:
        operation: Whose table.
        variant: What was compiled.
        code: The code.
        folder: For files.
        stack: What a tile that is taken unmeasured may spill, in bytes a thread.
    """
    import triton

    found, committed = usage(code, folder), read(operation)
    print(variant, *found)
    assert found.shared <= chips.shared_memory(CHIPS[variant.arch])
    assert found.stack <= stack or not variant.first
    if str(variant) in committed:
        most = Usage(*committed[str(variant)])
        if committed["triton"] == triton.__version__:
            assert all(x <= y for x, y in zip(found, most, strict=True)), found
        assert found.stack <= most.stack + ALLOWANCE, found
    return found


def assert_written_down(operation: str, variants: Iterable[Variant]) -> None:
    """Everything that is taken unmeasured is in the table, and nothing that is no variant."""
    named = {str(variant): variant.first for variant in variants}
    table = read(operation).keys() - {"triton"}
    assert table <= named.keys(), f"no variants: {sorted(table - named.keys())}"
    missing = [name for name, first in named.items() if first and name not in table]
    assert not missing, f"not written down: {missing}"


def write(operation: str, variants: Iterable[Variant]) -> None:
    """Compile what is not written down yet, first what is taken unmeasured, and add it to the table."""
    import triton

    every = list(variants)
    table = read(operation)
    if table.get("triton") != triton.__version__:
        table = {"triton": triton.__version__}
    with tempfile.TemporaryDirectory() as folder:
        for variant in sorted(every, key=lambda x: not x.first):
            if str(variant) in table:
                continue
            table[str(variant)] = list(usage(variant.compile(), Path(folder)))
            print(variant, *table[str(variant)], file=sys.stderr, flush=True)
            names = ["triton", *(str(x) for x in every if str(x) in table)]
            lines = [f"{json.dumps(name)}: {json.dumps(table[name])}" for name in names]
            path(operation).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    for operation in sys.argv[1:] or MODULES:
        write(operation, importlib.import_module(f"{__package__}.{MODULES[operation]}").variants())


if __name__ == "__main__":
    main()
