"""Stand-in kernels, and a registry that is as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from foldkernels.kernels import registry
from foldkernels.kernels.attention import reference
from foldkernels.kernels.registry import dispatch, registration
from foldkernels.kernels.registry.types import Kernel, KernelFunction, Reason, Request

_STATE = (
    (registration, ("_operations", "_kernels", "_broken_plugins", "_thresholds")),
    (dispatch, ("_decided", "_fused")),
)


@contextmanager
def restored() -> Iterator[None]:
    """Whatever is registered inside is gone afterwards."""
    registry.operations()
    kept = {(module, name): dict(getattr(module, name)) for module, names in _STATE for name in names}
    kept_by_operation = {name: dict(kernels) for name, kernels in registration._kernels.items()}
    loaded, discovered = dict(vars(dispatch._loaded)), registration._discovered
    try:
        yield
    finally:
        for (module, name), content in kept.items():
            now = getattr(module, name)
            now.clear()
            now.update(content)
        registration._kernels.update(kept_by_operation)
        vars(dispatch._loaded).clear()
        vars(dispatch._loaded).update(loaded)
        registration._discovered = discovered


def run_a(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """Attention, as the reference computes it."""
    return reference.run(q, k, v, *rest)


def run_b(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """Likewise: a kernel of another name."""
    return reference.run(q, k, v, *rest)


def load_a() -> KernelFunction:
    return run_a


def load_b() -> KernelFunction:
    return run_b


def serves(request: Request) -> list[Reason]:
    return []


def refuses(request: Request) -> list[Reason]:
    return [Reason("it never runs", "wait"), Reason("and the moon is full")]


def from_16_on(request: Request) -> list[Reason]:
    return [] if request.dims["n"] >= 16 else [Reason("it serves 16 residues or more", "use more residues")]


def stand_in(
    name: str,
    supports: Callable[[Request], list[Reason]] = serves,
    operation: str = "attention",
    load: Callable[[], KernelFunction] = load_a,
    **fields: Any,
) -> Kernel:
    """Register a kernel that computes attention; it takes the place of one with its name."""
    return registry.register(operation=operation, name=name, supports=supports, load=load, **fields)
