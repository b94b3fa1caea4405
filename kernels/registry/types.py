"""What the registry talks about: operations, requests for them, kernels that may serve, and why one does not.

Everything here is data. A choice for an H100 or a Mac can therefore be made, and tested, on any machine.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

KernelFunction = Callable[..., Any]


#: Transforms that plain PyTorch goes through, and a custom operator does not.
ALL_TRANSFORMS = frozenset({"forward", "func"})


@dataclass(frozen=True)
class Reason:
    """Why a kernel cannot serve a request, and what the user can do about it. Neither ends in a full stop."""

    why: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.why} (fix: {self.fix})" if self.fix else self.why


class Dims(Mapping[str, int]):
    """The sizes of a request by name; a mapping that can be hashed."""

    __slots__ = ("_items",)

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._items = tuple(sizes.items())

    def __getitem__(self, name: str) -> int:
        for key, size in self._items:
            if key == name:
                return size
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dims) and self._items == other._items

    def __repr__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self._items)


@dataclass(frozen=True)
class Request:
    """One use of an operation, without its tensors.

    Attributes:
        operation: The operation's name.
        device: "cuda", "mps", "cpu" or another PyTorch device type.
        capability: The CUDA compute capability, None elsewhere.
        dtype: The floating type of the data; under autocast, the type that autocast makes it.
        precision: What a kernel may round to: "float32", "tf32" or "bfloat16".
        grad: Whether a backward pass may follow.
        compiled: Whether Dynamo is tracing.
        deterministic: Whether the results must be the same in every run.
        dims: The sizes, by the names that the operation declares.
        options: Optional features that the call uses, by the names that the operation declares.
    """

    operation: str
    device: str
    dtype: torch.dtype
    dims: Dims
    capability: tuple[int, int] | None = None
    precision: str = "float32"
    grad: bool = False
    compiled: bool = False
    deterministic: bool = False
    options: frozenset[str] = frozenset()

    def __str__(self) -> str:
        chip = f" {self.capability[0]}.{self.capability[1]}" if self.capability else ""
        words = [f"{self.device}{chip}", str(self.dtype).removeprefix("torch."), repr(self.dims)]
        words += ["with gradients"] if self.grad else []
        words += ["compiled"] if self.compiled else []
        words += ["deterministic"] if self.deterministic else []
        words += [f"precision {self.precision}"] if self.precision != "float32" else []
        words += [f"with {', '.join(sorted(self.options))}"] if self.options else []
        return f"{self.operation} on {', '.join(words)}"


@dataclass(frozen=True)
class Operation:
    """A function on tensors that kernels compute.

    Attributes:
        name: The folder's name.
        summary: What it computes, in one line.
        dims: The names of the sizes that a request carries.
        length: The one among them that varies from call to call: the number of residues or tokens.
        options: The names of optional features that a call may use.
        fuses: For several operations in one: which. It is used where all of them would run kernels of one name, and it
            has a kernel of that name that serves.
    """

    name: str
    summary: str
    dims: tuple[str, ...]
    length: str = "n"
    options: tuple[str, ...] = ()
    fuses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kernel:
    """One way to compute an operation.

    Attributes:
        operation: The operation's name.
        name: The kernel's name, and its file's.
        supports: Every reason against a request; empty when the kernel can serve it. It is given data only.
        load: The deferred import; returns the module-level function that computes.
        needs: Requirements on packages, as pip writes them.
        backward: Whether it has a backward pass.
        deterministic: Whether its results are the same in every run.
        thresholds: The lengths at which `supports` changes its answer: it may compare the length with these only.
        transforms: Which transforms go through it: "forward" (forward-mode differentiation, `torch.func.jvp`) and
            "func" (`torch.func.grad`, `vmap` and what is made of them). None unless it says so: a custom operator
            gives zero tangents without a word. A call under another one raises `TransformUnsupported`.
    """

    operation: str
    name: str
    supports: Callable[[Request], list[Reason]]
    load: Callable[[], KernelFunction]
    needs: tuple[str, ...] = ()
    backward: bool = True
    deterministic: bool = True
    thresholds: tuple[int, ...] = ()
    transforms: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Decision:
    """Which kernel serves a request, and why each better candidate does not.

    Attributes:
        request: What was asked for.
        kernel: The kernel that was chosen.
        rejected: The candidates before it, best first, each with every reason against it.
        source: "preset flash", or "required" for a kernel that the configuration names.
    """

    request: Request
    kernel: Kernel
    source: str
    rejected: tuple[tuple[str, tuple[Reason, ...]], ...] = field(default=())

    @property
    def fell_back(self) -> bool:
        """Whether the device's first choice could not run."""
        return bool(self.rejected)

    def __str__(self) -> str:
        lines = [f"{self.request}: {self.kernel.name} ({self.source})"]
        lines += [f"  not {name}: {reason}" for name, reasons in self.rejected for reason in reasons]
        return "\n".join(lines)


def serves_everything(request: Request) -> list[Reason]:
    """The `supports` of a kernel without limits."""
    return []
