"""OpenFold's own linear layer and LayerNorm, which Boltz, RhoFold and Hugging Face have copied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..recognition import Declined

_LINEARS = ("Linear", "EsmFoldLinear")
_NORMS = ("LayerNorm", "EsmFoldLayerNorm")
_SMALLEST_INF = 1e4

HALF = "in float16 its own forward runs: it guards against overflow"


def require_linears(module: nn.Module, names: Iterable[str]) -> None:
    """These children (dotted names) are PyTorch's linear layers, or OpenFold's, whose initialisation alone differs.

    OpenFold's has a forward of its own, for bfloat16; with a `precision` it is another function.
    """
    for name in names:
        child: Any = _child(module, name)
        kind = type(child)
        copied = (
            isinstance(child, nn.Linear) and kind.__name__ in _LINEARS and set(child._parameters) == {"weight", "bias"}
        )
        if kind is not nn.Linear and not copied:
            raise Declined(f"its {name} is a {kind.__name__}, no plain Linear")
        if getattr(child, "precision", None) is not None:
            raise Declined(f"its {name} has a precision of its own ({child.precision})")


def require_norms(module: nn.Module, names: Iterable[str], width: int) -> float:
    """These children are LayerNorms over the last axis, with a scale and a shift.

    Returns:
        Their epsilon.
    """
    epsilons = set()
    for name in names:
        child: Any = _child(module, name)
        if type(child) is not nn.LayerNorm and type(child).__name__ not in _NORMS:
            raise Declined(f"its {name} is a {type(child).__name__}, no plain LayerNorm")
        shape = tuple(getattr(child, "normalized_shape", None) or getattr(child, "c_in", None) or ())
        if shape != (width,) or not isinstance(child.eps, float):
            raise Declined(f"its {name} is no LayerNorm over {width} channels")
        epsilons.add(child.eps)
    if len(epsilons) != 1:
        raise Declined(f"its LayerNorms have several epsilons: {sorted(epsilons)}")
    return float(epsilons.pop())


def require_mask(inf: Any) -> None:
    """What is added to a masked logit is large enough to be a mask: kernels leave masked keys out altogether."""
    if isinstance(inf, bool) or not isinstance(inf, int | float) or inf < _SMALLEST_INF:
        raise Declined(f"its inf of {inf} does not mask for certain")


def in_float16(x: Tensor) -> bool:
    """Whether what is computed from `x` is computed in float16."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) is torch.float16
    return x.dtype is torch.float16


def _child(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise Declined(f"it has no {name}") from None
