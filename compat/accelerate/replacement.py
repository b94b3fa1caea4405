"""Putting a forward on a module, and taking it off again: a few entries in the instance's own dictionary.

The parameters, the buffers, the hooks and the class stay as they are. A bound method would not do: it is pickled as the
name of a method of the class, which the other project's class does not have.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ...kernels.registry.binding import Use
from .recognition import Forward, Recognised

# DataParallel copies a module's dictionary to a replica for each GPU: the replica's forward must be its own.
_REPLICATE = "_replicate_for_data_parallel"
_ENTRIES = ("forward", "kernel_config", "kernel_uses", _REPLICATE)


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

    @property
    def __signature__(self) -> inspect.Signature:
        found = inspect.signature(self.function)
        return found.replace(parameters=list(found.parameters.values())[1:])

    def __repr__(self) -> str:
        return f"<foldkernels' {self.function.__name__} for {type(self.module).__name__}>"


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
        entries["kernel_uses"] = Bound(self.recognised.uses, self.module)
        entries["forward"] = Bound(self.recognised.forward, self.module)
        entries[_REPLICATE] = Bound(replicate, self.module)


def replicate(module: nn.Module) -> nn.Module:
    """What DataParallel calls for each GPU: the class's own replica, with our functions bound to it."""
    replica: nn.Module = getattr(type(module), _REPLICATE)(module)
    for name, entry in list(replica.__dict__.items()):
        if isinstance(entry, Bound):
            replica.__dict__[name] = Bound(entry.function, replica)
    return replica


def is_replaced(module: nn.Module) -> bool:
    """Whether the module runs a forward of ours."""
    return isinstance(module.__dict__.get("forward"), Bound)


def put_back(module: nn.Module) -> None:
    """Let the module run its class's forward again."""
    for name in _ENTRIES:
        module.__dict__.pop(name, None)


def original_forward(module: nn.Module) -> Forward:
    """The forward of the module's class: what runs where a call asks for what a kernel does not do."""
    return type(module).forward
