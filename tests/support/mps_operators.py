"""What MPS has a kernel for, and what runs: read from the native_functions.yaml that comes with torch.

Attention is traced in PyTorch's composite form, because its fused CPU operators are a CPU's choice, and inside our
custom operators too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torchgen
import yaml
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

#: Operators that need no MPS kernel, each with the reason why.
ALLOWED: dict[str, str] = {}
COMPOSITE = ("CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")


# What has an MPS kernel -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def functions() -> Mapping[str, Mapping[str, Any]]:
    """torch's own list of operators by name, "add.Tensor"."""
    file = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    entries = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)
    return {entry["func"].partition("(")[0].strip(): entry for entry in entries}


def keys(name: str) -> set[str]:
    """The dispatch keys of an operator.

    Raises:
        KeyError: torch's list does not have it.
    """
    entry = functions()[name]
    if "structured_delegate" in entry:
        return keys(entry["structured_delegate"])
    if "dispatch" not in entry:
        return {"CompositeImplicitAutograd"}
    return {key.strip() for several in entry["dispatch"] for key in several.split(",")}


def runs_on_mps(name: str) -> bool:
    """Whether MPS has a kernel, or the operator is made of others."""
    found = keys(name)
    # torch writes the out= and functional forms of some operators itself, from the one that is listed.
    return bool(found & {"MPS", *COMPOSITE}) or bool(functions()[name].get("autogen") and found & {"MPS", *COMPOSITE})


def tensors_in(x: Any) -> list[Tensor]:
    """Every tensor in nested lists, tuples and dicts, in some order."""
    found, left = [], [x]
    while left:
        x = left.pop()
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, list | tuple):
            left.extend(x)
        elif isinstance(x, dict):
            left.extend(x.values())
    return found


class Collect(TorchDispatchMode):
    """Collect the operators that run, and where a tensor of float64 appears.

    Args:
        elsewhere: Whether an operator that runs now is a CPU's by design.
    """

    def __init__(self, elsewhere: Callable[[], bool] = lambda: False) -> None:
        super().__init__()
        self.operators: set[str] = set()
        self.on_the_cpu: set[str] = set()
        self.inside: set[str] = set()
        self.wide: set[str] = set()
        self.elsewhere = elsewhere

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name()
        ours = OPDEFS.get(name.partition(".")[0])
        if ours is not None:
            # Run its Python body under this mode, to see what it is made of.
            self.inside.add(name)
            with self, self.body():
                return ours._init_fn(*args, **(kwargs or {}))
        if name.startswith("profiler::"):
            return func(*args, **(kwargs or {}))
        # Inside a custom operator, which is below autograd, composite operators arrive whole.
        with self:
            out = func.decompose(*args, **(kwargs or {}))
        if out is not NotImplemented:
            return out
        out = func(*args, **(kwargs or {}))
        if self.elsewhere():
            self.on_the_cpu.add(name)
            return out
        self.record(func, (args, kwargs or {}), out)
        return out

    def body(self) -> AbstractContextManager[Any]:
        """What else holds while the body of a custom operator runs."""
        return nullcontext()

    def record(self, func: Any, given: Any, out: Any) -> None:
        """Note an operator that ran."""
        name = func.name()
        self.operators.add(name)
        if any(x.dtype is torch.float64 for x in tensors_in((given, out))):
            self.wide.add(name)

    def missing(self) -> list[str]:
        """Operators without an MPS kernel, unknown ones among them."""
        missing = []
        for name in sorted(self.operators):
            short = name.removeprefix("aten::")
            if short in ALLOWED:
                continue
            if short not in functions():
                missing.append(f"{name} (torch's list does not have it)")
            elif not runs_on_mps(short):
                missing.append(name)
        return missing


@contextmanager
def collected(
    elsewhere: Callable[[], bool] = lambda: False, collect: Collect | None = None, needed: bool = True
) -> Iterator[Collect]:
    """Run as a Mac would, and fail if a Mac could not; or, where operators are `needed`, if nothing ran."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), collect or Collect(elsewhere) as found:
            yield found
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert found.operators or not needed, "nothing ran"
    refuse("operators without an MPS kernel", found.missing())
    refuse("operators that saw a float64 tensor", found.wide)


def refuse(what: str, names: Iterable[str]) -> None:
    """Fail if there are any.

    Raises:
        AssertionError: There are; the message has each on a line of its own.
    """
    listed = sorted(names)
    assert not listed, "\n  ".join([what, *listed])
