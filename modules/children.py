"""Children whose weights a forward reads in place of calling them, and whether they still are what they were.

A kernel takes a linear layer's weight and computes what the layer would. It does so only while the layer is PyTorch's
own: a LoRA layer in its place, a hook, a pruned, quantized, sharded or offloaded weight change what a call computes,
and a kernel would pass over that in silence. So every such forward asks its `ChildGuard` first, at each call.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_internals

from ..kernels.dtypes import under_autocast
from ..kernels.registry import KernelFallbackWarning

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS: tuple[dict[int, Any], ...] = tuple(getattr(module_internals, f"_global{name}") for name in _HOOKS)
_PLAIN = (nn.Parameter, Tensor)
_PYTORCHS_OWN = (nn.Linear.forward, nn.LayerNorm.forward)
_warned: set[tuple[str, str]] = set()


class _Child(NamedTuple):
    """A child as it was.

    Attributes:
        parent: Index of its parent among the modules that have children; 0 is the guarded module itself.
        key: Its name in its parent.
        kind: Its class.
        children: How many children it has.
        weight: The name of its first parameter; empty if it has none.
        size: How many numbers that holds.
        bias: The name of its second parameter; empty if it has none.
        has_bias: Whether that is not None.
        eps: Its epsilon, if it has one.
        may_cast: The one floating type of an input that its weights need not have: OpenFold's layers cast to bfloat16,
            PyTorch's never. Where another type is computed in, they raise.
    """

    parent: int
    key: str
    kind: type[nn.Module]
    children: int
    weight: str
    size: int
    bias: str
    has_bias: bool
    eps: float | None
    may_cast: torch.dtype | None


class ChildGuard:
    """The children that a module's forward does not call, as they were when it was made. It refers to none of them.

    Args:
        module: The module.
        called: Dotted names of children that the forward calls as modules: whatever becomes of these, and of what
            stands inside them, takes effect by itself.
        only: Dotted names of the children that are not called; all but `called` when None.
    """

    def __init__(self, module: nn.Module, called: Collection[str] = (), only: Collection[str] | None = None) -> None:
        described = dict(_described(module, tuple(called), None if only is None else tuple(only)))
        self._names = tuple(described)
        self._children = tuple(described.values())
        kinds = dict.fromkeys([type(module), *(child.kind for child in self._children)])
        self._forwards = tuple((kind, kind.forward) for kind in kinds)

    def __deepcopy__(self, memo: dict[int, Any]) -> ChildGuard:
        """Itself: it never changes, and says nothing of one copy alone."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the functions: pickle looks them up by name, and a patched one is not found under its own."""
        return {**self.__dict__, "_forwards": tuple(kind for kind, _ in self._forwards)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _forwards=tuple((kind, kind.forward) for kind in state["_forwards"]))

    def holds(self, module: nn.Module, like: Tensor | None = None) -> bool:
        """Whether the children may be read in place of being called. A few microseconds; Dynamo traces it.

        Devices are no business of this: an operation raises where its tensors are on several.

        Args:
            module: The module.
            like: An input whose floating type the weights must have, where PyTorch's own layers ask for that.
        """
        for hooks in _GLOBAL_HOOKS:
            if hooks:
                return False
        for kind, forward in self._forwards:
            if kind.forward is not forward:
                return False
        dtype = None if like is None else like.dtype
        parents = [module]
        # Written out, with each dictionary looked at once: this runs at every call.
        for parent, key, kind, children, weight, size, bias, has_bias, eps, may_cast in self._children:
            child = parents[parent]._modules.get(key)
            if child is None or type(child) is not kind:
                return False
            state = child.__dict__
            if (
                state["_forward_hooks"]
                or state["_forward_pre_hooks"]
                or state["_backward_hooks"]
                or state["_backward_pre_hooks"]
                or "forward" in state
            ):
                return False
            if children:
                if len(state["_modules"]) != children:
                    return False
                parents.append(child)
            if weight:
                registered = state["_parameters"]
                # A replica's, a sharded layer's and a transformed call's weights are plain attributes.
                value: Any = registered[weight] if weight in registered else getattr(child, weight, None)
                if value is None or value.numel() != size or not (type(value) in _PLAIN or _is_traced(value)):
                    return False
                if dtype not in (None, may_cast, value.dtype) and not under_autocast(value):
                    return False
                if bias:
                    value = registered[bias] if bias in registered else getattr(child, bias, None)
                    if (value is not None) is not has_bias:
                        return False
                    if has_bias and not (type(value) in _PLAIN or _is_traced(value)):
                        return False
                if eps is not None and state["eps"] != eps:
                    return False
        return True

    def change(self, module: nn.Module) -> str:
        """What keeps `holds` from being true, as a clause; empty where that is a floating type alone."""
        if any_global_hook():
            return "a hook is registered for all modules"
        parents = [module]
        for name, was in zip(self._names, self._children, strict=True):
            child: Any = parents[was.parent]._modules.get(was.key)
            if child is None:
                return f"its {name} is gone"
            if type(child) is not was.kind:
                return f"its {name} is a {_class_name(type(child))} now, and was a {_class_name(was.kind)}"
            if "forward" in child.__dict__:
                return f"its {name} has a forward of its own on the instance"
            if has_hooks(child):
                return f"its {name} has a hook"
            if was.children:
                parents.append(child)
            if len(child._modules) != was.children or child.__dict__.get("eps") != was.eps:
                return f"its {name} has changed inside"
            for key, present in ((was.weight, True), (was.bias, was.has_bias)):
                value = getattr(child, key, None) if key else None
                if key and (value is not None) is not present:
                    return f"its {name} has {'no' if present else 'a'} {key} now"
                if value is not None and not (type(value) in _PLAIN or _is_traced(value)):
                    return f"the {key} of its {name} is a {type(value).__name__} now"
            if was.weight and getattr(child, was.weight).numel() != was.size:
                return f"the {was.weight} of its {name} has another shape now"
        changed = [kind.__name__ for kind, forward in self._forwards if kind.forward is not forward]
        return f"the class {changed[0]} has another forward now" if changed else ""


def _class_name(kind: type) -> str:
    """Qualified name of a class: LoRA's and quantized layers are called Linear, too."""
    return f"{kind.__module__}.{kind.__qualname__}"


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody has registered a hook on the module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def any_global_hook() -> bool:
    """Whether somebody has registered a hook for all modules."""
    return any(bool(hooks) for hooks in _GLOBAL_HOOKS)


def may_read(module: nn.Module, guard: ChildGuard) -> bool:
    """Whether the weights of a module's children may be read; says once what has changed where they may not.

    Args:
        module: The module, one of this package's own.
        guard: Its guard.

    Warns:
        KernelFallbackWarning: They may not.
    """
    if guard.holds(module):
        return True
    warn_of_change(module, guard, "it is called as a layer, and no kernel reads its weights")
    return False


def warn_of_change(module: nn.Module, guard: ChildGuard, instead: str) -> None:
    """Say once for each class and change what runs in place of a kernel that reads weights.

    Nothing is said in a compiled graph.

    Args:
        module: The module.
        guard: Its guard, which does not hold.
        instead: What runs instead.

    Warns:
        KernelFallbackWarning: As said.
    """
    if torch.compiler.is_compiling():
        return
    change = guard.change(module)
    key = (type(module).__name__, change)
    if change and key not in _warned:
        _warned.add(key)
        warnings.warn(f"{key[0]}: {change}: {instead}", KernelFallbackWarning, stacklevel=4)


def _described(
    module: nn.Module, called: tuple[str, ...], only: tuple[str, ...] | None
) -> Iterator[tuple[str, _Child]]:
    """Each child that is not called, parents before their children."""
    parents = {"": 0}
    for name, child in module.named_modules(remove_duplicate=False):
        if not name or any(_is_within(name, outer) for outer in called):
            continue
        if only is not None and not any(_is_within(name, read) or _is_within(read, name) for read in only):
            continue
        above, _, key = name.rpartition(".")
        if child._modules:
            parents[name] = len(parents)
        weight, bias = [*child._parameters, "", ""][:2]
        value = child._parameters.get(weight)
        kind = type(child)
        yield (
            name,
            _Child(
                parent=parents[above],
                key=key,
                kind=kind,
                children=len(child._modules),
                weight="" if value is None else weight,
                size=0 if value is None else value.numel(),
                bias="" if value is None else bias,
                has_bias=child._parameters.get(bias) is not None,
                eps=child.__dict__.get("eps"),
                may_cast=None if kind.forward in _PYTORCHS_OWN else torch.bfloat16,
            ),
        )


def _is_within(name: str, outer: str) -> bool:
    """Whether a dotted name is another, or stands inside it."""
    return name == outer or name.startswith(f"{outer}.")


def _is_traced(weight: Tensor) -> bool:
    """Whether a tracer's stand-in takes a plain tensor's place. Its module is loaded wherever there is one."""
    fake, functional = (sys.modules.get(f"torch._subclasses.{name}") for name in ("fake_tensor", "functional_tensor"))
    return (fake is not None and isinstance(weight, fake.FakeTensor)) or (
        functional is not None and isinstance(weight, functional.FunctionalTensor)
    )
