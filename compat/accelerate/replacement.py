"""Putting a forward on a module, and taking it off again: a few entries in the instance's own dictionary.

The parameters, the buffers, the hooks and the class stay as they are. A bound method would not do: it is pickled as the
name of a method of the class, which the other project's class does not have.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any

from torch import Tensor, nn

from ...kernels.registry.binding import Use
from ...modules.children import ChildGuard, warn_of_change
from .recognition import Forward, Recognised

# DataParallel copies a module's dictionary to a replica for each GPU: the replica's forward must be its own.
_REPLICATE = "_replicate_for_data_parallel"
_PLACED = "_foldkernels_forward"
_ENTRIES = ("kernel_config", "kernel_uses", _REPLICATE, _PLACED)


class Bound:
    """A module-level function with its first argument, the module.

    It follows its module through `deepcopy` and pickling, and Dynamo traces through it.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        self.function = function
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(self.module, *args, **kwargs)

    def on(self, module: nn.Module) -> Bound:
        """The same for another module."""
        return type(self)(self.function, module)

    @property
    def __signature__(self) -> inspect.Signature:
        found = inspect.signature(self.function)
        return found.replace(parameters=list(found.parameters.values())[1:])

    @property
    def __code__(self) -> CodeType:
        """The function's code, where torch.export reads the names of the parameters."""
        return self.function.__code__

    def __repr__(self) -> str:
        return f"<foldkernels' {self.function.__name__} for {type(self.module).__name__}>"


class BoundForward(Bound):
    """A forward of ours, for as long as what it reads of the module's children is what it was.

    Otherwise, and where there is nothing to compute, the module's own forward runs. It calls its children.
    """

    def __init__(self, function: Forward, module: nn.Module, guard: ChildGuard | None) -> None:
        super().__init__(function, module)
        self.guard = guard

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function, or the module's own forward."""
        module, guard = self.module, self.guard
        if guard is not None:
            like = _first_floating(args, kwargs)
            if like is not None and like.numel() == 0:
                return original_forward(module)(module, *args, **kwargs)
            if not guard.holds(module, like):
                warn_of_change(module, guard, "its own forward runs, which calls its children")
                return original_forward(module)(module, *args, **kwargs)
        return self.function(module, *args, **kwargs)

    def on(self, module: nn.Module) -> BoundForward:
        """The same for another module."""
        return BoundForward(self.function, module, self.guard)


def _first_floating(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor of a call that holds floating-point numbers."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None


class Uses:
    """The operations that a forward of ours calls, as they were found: sizes are no longer asked of its children."""

    def __init__(self, uses: tuple[Use, ...]) -> None:
        self.uses = uses

    def __call__(self) -> list[Use]:
        """The uses."""
        return list(self.uses)


class Candidate:
    """A recognised module as `bind` takes it, before anything is put on it."""

    def __init__(self, module: nn.Module, recognised: Recognised) -> None:
        self.module = module
        self.recognised = recognised
        self.kernel_config = ""

    def kernel_uses(self) -> list[Use]:
        """The operations that the new forward will call."""
        return self.recognised.uses(self.module)

    def replace(self) -> None:
        """Put the forward, and the configuration that `bind` gave, on the module."""
        entries = self.module.__dict__
        entries["kernel_config"] = self.kernel_config
        entries["kernel_uses"] = Uses(tuple(self.recognised.uses(self.module)))
        guard = ChildGuard(self.module, self.recognised.calls) if self.recognised.encloses else None
        entries["forward"] = entries[_PLACED] = BoundForward(self.recognised.forward, self.module, guard)
        entries[_REPLICATE] = Bound(replicate, self.module)


def replicate(module: nn.Module) -> nn.Module:
    """What DataParallel calls for each GPU: the class's own replica, with our functions bound to it."""
    replica: nn.Module = getattr(type(module), _REPLICATE)(module)
    for name, entry in list(replica.__dict__.items()):
        if isinstance(entry, Bound):
            replica.__dict__[name] = entry.on(replica)
    return replica


def is_replaced(module: nn.Module) -> bool:
    """Tell if the module runs a forward of ours, or a wrapper that was put around it later."""
    return isinstance(module.__dict__.get(_PLACED), Bound)


def put_back(module: nn.Module) -> None:
    """Let the module run its class's forward again, inside of whatever was put around ours later."""
    placed = module.__dict__[_PLACED]
    if module.__dict__.get("forward") is placed:
        del module.__dict__["forward"]
    # Whoever wrapped it keeps calling it: from now on it is the class's.
    placed.function, placed.guard = type(module).forward, None
    for name in _ENTRIES:
        module.__dict__.pop(name, None)


def original_forward(module: nn.Module) -> Forward:
    """The forward of the module's class: what runs where a call asks for what a kernel does not do."""
    return type(module).forward
