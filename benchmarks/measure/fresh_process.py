"""Measure in a fresh process, and what glibc's allocator is told there."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# glibc hands blocks above mmap_threshold (it adapts, up to 32 MiB) back to the kernel when they are freed, and trims
# the heap's top; the next tensor of that size page-faults on every 4 KiB again. These settings make it keep what it
# has: 16 GiB is more than any of our tensors. Read once, at exec. Seen to work with glibc 2.36; a release that caps
# the threshold at 32 MiB ignores a larger value in silence, which is why every comparison also counts page faults.
KEEP_MEMORY = "glibc.malloc.mmap_threshold=17179869184:glibc.malloc.trim_threshold=17179869184"

# The opposite, for measuring memory: every block of 128 KiB or more is mapped by itself and unmapped when it is freed,
# and the threshold stays there. Peak RSS is then what is alive, and not how the heap happened to fragment: with glibc's
# defaults the same forward pass showed 93 or 135 MB, depending on what had been freed before it.
EXACT_MEMORY = "glibc.malloc.mmap_threshold=131072"


class ChildFailed(RuntimeError):
    """A measurement in a fresh process raised, or the process died."""


def in_fresh_process(
    target: Callable[..., Any] | str,
    *arguments: Any,
    keep_memory: bool = False,
    environment: Mapping[str, str] | None = None,
    **keywords: Any,
) -> Any:
    """Call a module-level function in a new interpreter and return what it returns.

    Args:
        target: the function, or its address as "package.module:name".
        *arguments: JSON values.
        keep_memory: run under `KEEP_MEMORY`, so that glibc gives no memory back.
        environment: variables to add.
        **keywords: JSON values.

    Returns:
        The function's result, which must be a JSON value.

    Raises:
        ChildFailed: with the child's error output.
    """
    request = {"target": _address(target), "arguments": arguments, "keywords": keywords}
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    if keep_memory:
        variables["GLIBC_TUNABLES"] = KEEP_MEMORY
    variables.update(environment or {})
    this_module = _address(_answer).split(":")[0]
    with tempfile.TemporaryDirectory() as folder:
        reply = Path(folder) / "reply.json"
        child = subprocess.run(
            [sys.executable, "-c", f"from {this_module} import _answer; _answer()", str(reply)],
            input=json.dumps(request),
            env=variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if child.returncode != 0 or not reply.exists():
            raise ChildFailed(f"{request['target']} failed (exit status {child.returncode}):\n{child.stderr[-4000:]}")
        return json.loads(reply.read_text())


def _address(function: Callable[..., Any] | str) -> str:
    """`package.module:name`, also of a function in the script that is running."""
    if isinstance(function, str):
        return function
    name = function.__module__
    if name == "__main__":
        specification = getattr(sys.modules["__main__"], "__spec__", None)
        if specification is None:
            raise ValueError("a fresh process cannot find functions of a script: run it with `python -m`")
        name = specification.name
    if "<" in function.__qualname__:
        raise ValueError(f"{function.__qualname__} is not a module-level function")
    return f"{name}:{function.__qualname__}"


def _resolve(address: str) -> Callable[..., Any]:
    """The function at "package.module:name"."""
    module, name = address.split(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _answer() -> None:
    """The child's side of `in_fresh_process`."""
    request = json.load(sys.stdin)
    result = _resolve(request["target"])(*request["arguments"], **request["keywords"])
    Path(sys.argv[1]).write_text(json.dumps(result))
