"""Triton without a GPU: a process that runs its interpreter, and what ptxas makes of compiled code."""

import json
import os
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.version import Version

try:
    import triton
except ImportError as error:
    PTXAS = Path()
    WHY_NOT = f"triton cannot be imported: {error}"
else:
    PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    WHY_NOT = "" if PTXAS.exists() else f"this triton brings no ptxas: {PTXAS}"
    if Version(triton.__version__) < Version("3.6"):  # an old torch's, which our kernels refuse
        WHY_NOT = f"triton {triton.__version__} is older than 3.6, which the kernels need"

with_triton = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

Ask = Callable[..., dict[str, Any]]
SECONDS = 600

#: The chips that are compiled for.
CHIPS = {80: (8, 0), 89: (8, 9), 90: (9, 0), 100: (10, 0)}


@contextmanager
def interpreter(script: str, plain: Mapping[str, Any]) -> Iterator[Ask]:
    """Ask a script that runs beside us, in Triton's interpreter, about a case: `plain`, but for what is named.

    Args:
        script: Its name in this folder.
        plain: The case, as far as a question names nothing else.
    """
    here = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(here), "TRITON_INTERPRET": "1"}
    with tempfile.TemporaryFile("w+") as log:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
        process = subprocess.Popen([sys.executable, "-P", "-m", f"support.{script}"], env=env, **pipes)
        assert process.stdin is not None and process.stdout is not None

        def answer(**case: Any) -> dict[str, Any]:
            asked = {**plain, **case}
            print(json.dumps(asked), file=process.stdin, flush=True)
            ready, _, _ = select.select([process.stdout], [], [], SECONDS)
            line = process.stdout.readline() if ready else ""
            if not line:
                log.seek(0)
                pytest.fail(f"no answer to {asked}: {log.read()[-2000:]}")
            found: dict[str, Any] = json.loads(line)
            assert "raised" not in found, found["raised"]
            return found

        try:
            yield answer
        finally:
            process.stdin.close()
            process.stdout.close()
            process.kill()
            process.wait()


def compiled(
    target: Any,
    function: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    unaligned: Collection[str],
    *,
    warps: int,
    stages: int,
) -> Any:
    """A Triton kernel's code for a chip that is not here.

    Args:
        target: A `GPUTarget`, or the architecture of one of NVIDIA's chips, as 90.
        function: The kernel.
        types: The types of its arguments, as "*bf16"; those that are left out are 32-bit integers.
        constants: Arguments that are compiled in, those that the kernel does not have left out.
        unaligned: Arguments that may not be multiples of 16, in bytes for pointers; all others are.
        warps: Warps of a program.
        stages: Tiles that are under way.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    inside = {name: value for name, value in constants.items() if name in names}
    source = ASTSource(
        function,
        {name: "constexpr" if name in inside else types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in inside.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name not in inside and name not in unaligned
        },
    )
    target = GPUTarget("cuda", target, 32) if isinstance(target, int) else target
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


class Usage(NamedTuple):
    """What a kernel takes of a chip: bytes of shared memory a block, registers and bytes of stack a thread."""

    shared: int
    registers: int
    stack: int


def usage(code: Any, folder: Path) -> Usage:
    """Read it out of compiled code."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(code.asm["cubin"])
    tool = PTXAS.with_name("cuobjdump")
    used = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", used)
    assert found is not None, used
    registers, stack = map(int, found.groups())
    return Usage(code.metadata.shared, registers, stack)


def wrong(found: Mapping[str, Any]) -> list[str]:
    """Outputs and gradients whose error, NaN among them, is more than it may be."""
    return [
        f"{name}: error {x['error']:.2g}, which may be {x['may_be']:.2g} (plain PyTorch's is {x['of_plain']:.2g})"
        for name, x in found.items()
        if isinstance(x, dict) and not x["error"] <= x["may_be"]
    ]


def right(found: Mapping[str, Any]) -> None:
    assert not wrong(found), "\n".join(wrong(found))
    assert not any(found.get("of_empty_rows", ())), "a row without keys is not zero"


def slow(*values: int) -> list[Any]:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
