"""Origin of a class's methods: a patched or overridden class is another function under the same name."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from types import FunctionType
from typing import Any

from torch import nn

from .recognition import Declined

#: Packages whose decorators leave what a forward computes as it is.
_DECORATORS = frozenset({"torch", "jaxtyping", "typeguard", "beartype", "contextlib", "functools"})
#: What a subclass may override: none of it is called in a forward.
UNCALLED = frozenset(
    {"__init__", "__repr__", "__str__", "extra_repr", "reset_parameters", "__getstate__", "__setstate__"}
)


def require_original_class(kind: type[nn.Module], known: Collection[str], overridden: Collection[str] = ()) -> None:
    """The class is the original, or a subclass of it that computes the same.

    Args:
        kind: The class.
        known: The names under which the original, or the class that it derives from, is known.
        overridden: Methods that the original's own subclasses override.

    Raises:
        Declined: It overrides a method of a class of such a name.
    """
    for base in kind.__mro__[1:]:
        if base is nn.Module or not issubclass(base, nn.Module):
            continue
        if base.__name__ != kind.__name__ and base.__name__ not in known:
            continue
        for derived in kind.__mro__[: kind.__mro__.index(base)]:
            for name in _overridden(derived, base):
                if name not in overridden:
                    raise Declined(
                        f"its class {derived.__module__}.{derived.__qualname__} overrides {name} of "
                        f"{base.__module__}.{base.__qualname__}"
                    )


def require_own_forward(kind: type[nn.Module], where: str) -> None:
    """The class's forward is the one that was written in it, or in a base of it.

    Args:
        kind: The class.
        where: What is of this class, for the message.

    Raises:
        Declined: Something else has been put in its place.
    """
    stranger = _stranger(kind, kind.forward)
    if stranger:
        raise Declined(f"{where} is a {kind.__name__}, whose forward is {stranger} now (a patch of the class)")


def _stranger(kind: type[nn.Module], forward: Any) -> str:
    """Name of what has replaced a class's forward; empty where it is the class's own."""
    if forward is nn.Module.forward:
        return ""  # it has none, and is never called
    function, owners = forward, [base for base in kind.__mro__ if vars(base).get("forward") is forward]
    if not owners or type(function).__name__ == "cython_function_or_method":
        return ""
    home = {owner.__module__.partition(".")[0] for owner in owners} | _DECORATORS
    while isinstance(function, FunctionType) and hasattr(function, "__wrapped__"):
        if function.__globals__.get("__name__", "").partition(".")[0] not in home:
            return f"{function.__globals__.get('__name__')}.{function.__code__.co_qualname}"
        function = function.__wrapped__
    if not isinstance(function, FunctionType):
        return f"a {type(function).__name__}"
    written = (function.__globals__.get("__name__"), function.__code__.co_qualname)
    if any(written == (owner.__module__, f"{owner.__qualname__}.forward") for owner in owners):
        return ""
    return ".".join(str(part) for part in written)


def _overridden(derived: type, base: type) -> Iterator[str]:
    """Methods that a class has of its own, in place of those of its base that do something."""
    for name, method in vars(derived).items():
        below = vars(base).get(name)
        if name in UNCALLED or below is None or below is method:
            continue
        if (callable(method) or isinstance(method, property)) and not _is_abstract(below):
            yield name


def _is_abstract(method: Any) -> bool:
    code = getattr(method, "__code__", None)
    return getattr(method, "__isabstractmethod__", False) or (
        code is not None and "NotImplementedError" in code.co_names
    )
