"""foldkernels: the attention kernels of protein models. One word in YAML, the same numbers, faster."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compat.accelerate import accelerate, restore
    from .configs.kernel import KernelConfig
    from .kernels.registry import KernelFallbackWarning, KernelUnavailable, decide, record_kernels, register
    from .kernels.registry.binding import bind
    from .kernels.registry.explanation import explain

__version__ = "0.1.0"

# Loaded when asked for, so that `import foldkernels` costs next to nothing.
_HOMES = {
    "KernelConfig": ".configs.kernel",
    "KernelFallbackWarning": ".errors",
    "KernelUnavailable": ".errors",
    "accelerate": ".compat.accelerate",
    "bind": ".kernels.registry.binding",
    "decide": ".kernels.registry",
    "explain": ".kernels.registry.explanation",
    "record_kernels": ".kernels.registry",
    "register": ".kernels.registry",
    "restore": ".compat.accelerate",
}

__all__ = [
    "KernelConfig",
    "KernelFallbackWarning",
    "KernelUnavailable",
    "__version__",
    "accelerate",
    "bind",
    "decide",
    "explain",
    "record_kernels",
    "register",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
