"""What adapters ask of a module before they recognise it. Each check raises `Declined` with the reason."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import nn

from .provenance import UNCALLED, require_own_forward
from .recognition import Declined
from .replacement import is_replaced

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def class_among(module: nn.Module, names: Collection[str]) -> type[nn.Module] | None:
    """The module's class, or the nearest of its bases, that has one of these names.

    FSDP and `parametrize` put a class of their own over a module's.
    """
    return next((kind for kind in type(module).__mro__ if kind.__name__ in names), None)


def is_ours(module: nn.Module) -> bool:
    """Whether the module's class is this package's own: several have the names and parameters of others'."""
    return type(module).__module__.partition(".")[0] == __name__.partition(".")[0]


def require_untouched(module: nn.Module, *, hooks_inside: bool = False) -> None:
    """Nobody has changed how the module, or one inside it, runs: a new forward would go past that.

    Hooks on the module itself stay in force, and are no reason.

    Args:
        module: The module.
        hooks_inside: Whether hooks on what stands inside it stay in force, too.
    """
    for name, part in module.named_modules():
        where = f"its {name}" if name else "it"
        require_own_forward(type(part), where)
        if "forward" in part.__dict__ and not (hooks_inside and is_replaced(part)):
            raise Declined(f"{where} has a forward of its own on the instance (a checkpoint wrapper, or a patch)")
        if name and not hooks_inside and any(getattr(part, hooks) for hooks in _HOOKS):
            raise Declined(f"{where} has a hook, which a replaced forward would not call")
        if getattr(part, "parametrizations", None) is not None:
            raise Declined(f"{where} is parametrized")
        for key, value in part.__dict__.items():
            shadows = callable(value) and callable(getattr(type(part), key, None))
            if shadows and key != "forward" and key not in UNCALLED:
                raise Declined(f"{where} has a method {key} of its own on the instance")
        for key, weight in part._parameters.items():
            # What FSDP shards is whole again when the module is called.
            if weight is not None and type(weight) is not nn.Parameter and type(weight).__name__ != "DTensor":
                raise Declined(f"the {key} of {where} is a {type(weight).__name__}, which no kernel reads")
        if part._compiled_call_impl is not None:
            raise Declined(f"{where} is compiled already: accelerate first, compile then")


def require_parameters(
    module: nn.Module, shapes: Mapping[str, Sequence[int]], optional: Mapping[str, Sequence[int]] | None = None
) -> None:
    """The module has exactly these parameters, of these shapes; those of `optional` all together, or none of them."""
    found = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(remove_duplicate=False)}
    expected = {name: tuple(shape) for name, shape in shapes.items()}
    if optional and any(name in found for name in optional):
        expected |= {name: tuple(shape) for name, shape in optional.items()}
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing or unknown:
        parts = [f"no parameter {_listed(missing)}"] * bool(missing)
        parts += [f"a parameter it should not have: {_listed(unknown)}"] * bool(unknown)
        raise Declined(" and ".join(parts))
    for name, shape in expected.items():
        if found[name] != shape:
            raise Declined(f"{name} has shape {list(found[name])}, where its attributes say {list(shape)}")


def require_linear(module: nn.Module, *names: str) -> None:
    """These children (dotted names) are linear layers that compute what `nn.Linear` computes.

    OpenFold's `Linear`, which others have copied, has its own forward for 16 bits; a `precision` makes it another.
    """
    for name in names:
        child = _child(module, name)
        kind = type(child)
        copied = kind.__name__ == "Linear" and getattr(child, "precision", "") is None
        if not isinstance(child, nn.Linear) or not (kind.forward is nn.Linear.forward or copied):
            raise Declined(f"its {name} is a {kind.__name__} with a forward of its own, no plain Linear")


def require_exactly(module: nn.Module, **types: type[nn.Module]) -> None:
    """These children are of these very classes. A dot in a name is written as two underscores."""
    for key, kind in types.items():
        name = key.replace("__", ".")
        child = _child(module, name)
        if type(child) is not kind:
            raise Declined(f"its {name} is a {type(child).__name__}, no plain {kind.__name__}")


def require_layer_norm(module: nn.Module, name: str, width: int) -> None:
    """This child is a plain LayerNorm over the last axis, of this width, with a scale and a shift."""
    child: Any = _child(module, name)
    if type(child) is not nn.LayerNorm or tuple(child.normalized_shape) != (width,) or child.bias is None:
        raise Declined(f"its {name} is no plain LayerNorm over {width} channels")


def require_children(module: nn.Module, known: Collection[str]) -> None:
    """The module has no child beside those known; which of them must be there, other checks say."""
    unknown = [name for name, _ in module.named_children() if name not in known]
    if unknown:
        raise Declined(f"a submodule it should not have: {_listed(unknown)}")


def whole_numbers(module: nn.Module, *names: str) -> dict[str, int]:
    """Sizes that stand in the module's attributes."""
    found = {}
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, bool) or not isinstance(value, int):
            raise Declined(f"it has no whole number {name}")
        found[name] = value
    return found


def signature(module: nn.Module) -> tuple[str, ...]:
    """The names of the forward's parameters, without `self`; `=` ends one with a default.

    `*` begins `*args`, `**` keywords of any name, `*:` a parameter that must be named.
    """
    starts = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**", "KEYWORD_ONLY": "*:"}
    names = []
    for parameter in list(inspect.signature(type(module).forward).parameters.values())[1:]:
        start = starts.get(parameter.kind.name, "")
        end = "=" if parameter.default is not parameter.empty else ""
        names.append(start + parameter.name + end)
    return tuple(names)


def require_signature(module: nn.Module, *known: str) -> str:
    """The forward takes one of these lists of parameters.

    Args:
        module: The module.
        known: Lists as `signature` gives them, joined by blanks: `"s z r mask attention_mask="`.

    Returns:
        The list that it takes.
    """
    found = " ".join(signature(module))
    if found not in known:
        raise Declined(f"its forward takes ({found.replace(' ', ', ')}), which no known form does")
    return found


def require_constants(method: Callable[..., Any], *values: float) -> None:
    """The method's own code has these numbers in it: constants of the maths that no attribute tells."""
    code = getattr(inspect.unwrap(method), "__code__", None)
    missing = [value for value in values if code is None or value not in code.co_consts]
    if missing:
        raise Declined(f"{method.__qualname__} does not have the constant {_listed([str(v) for v in missing])}")


def _child(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise Declined(f"it has no {name}") from None


def _listed(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
