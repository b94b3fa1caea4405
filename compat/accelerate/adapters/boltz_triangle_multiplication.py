"""Triangle multiplication of Boltz: packed projections without biases, and a direction that stands in the name alone.

Jumper et al. 2021, Supplementary Algorithms 11 and 12.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.registry.binding import Use
from ....kernels.triangle_multiplication import Direction, triangle_multiplication
from ....modules.triangle_multiplication import TriangleMultiplication
from ..checks import class_among, require_children, require_linear, require_parameters, require_signature
from ..recognition import Adapter, Example, Forward, Recognised
from ..replacement import original_forward
from ._openfold import HALF, in_float16, require_norms
from ._pairs import is_square, pair_example, squares

_DIRECTIONS: dict[str, Direction] = {
    "TriangleMultiplicationOutgoing": "outgoing",
    "TriangleMultiplicationIncoming": "incoming",
}
_LINEARS = ("p_in", "g_in", "p_out", "g_out")


class BoltzTriangleMultiplication(Adapter):
    """`TriangleMultiplicationOutgoing` and `TriangleMultiplicationIncoming` of Boltz."""

    title = "Boltz's triangle multiplication"
    operations = ("triangle_multiplication",)
    classes = tuple(_DIRECTIONS)
    projects = ("Boltz-1", "Boltz-2")
    parameters = ("norm_in.weight", "p_in.weight", "g_in.weight", "norm_out.weight", "p_out.weight", "g_out.weight")

    def recognise(self, module: nn.Module) -> Recognised:
        """See the class."""
        require_linear(module, *_LINEARS)
        layer: Any = module
        width = layer.g_out.in_features
        shapes: dict[str, tuple[int, ...]] = {
            "p_in.weight": (2 * width, width),
            "g_in.weight": (2 * width, width),
            "p_out.weight": (width, width),
            "g_out.weight": (width, width),
            **{f"{norm}.{name}": (width,) for norm in ("norm_in", "norm_out") for name in ("weight", "bias")},
        }
        require_parameters(module, shapes)
        require_children(module, (*_LINEARS, "norm_in", "norm_out"))
        require_norms(module, ("norm_in", "norm_out"), width)
        forms: dict[str, tuple[str, Forward]] = {
            "x mask use_kernels=": ("Boltz", boltz),
            "x mask": ("Boltz up to 2.0", boltz_before_kernels),
        }
        form, forward = forms[require_signature(module, *forms)]
        return Recognised(form, forward, uses, (HALF,))

    def example(self, module: nn.Module, generator: torch.Generator) -> Example:
        """See the class."""
        layer: Any = module
        return pair_example(layer.g_out.in_features, generator)


def uses(layer: Any) -> list[Use]:
    """Triangle multiplication, at the layer's sizes."""
    return [Use("triangle_multiplication", {"cz": layer.g_out.in_features, "c": layer.p_out.in_features})]


def boltz(self: Any, x: Tensor, mask: Tensor, use_kernels: bool = False) -> Tensor:
    """The forward of Boltz from 2.1 on. The configuration chooses the kernel, whatever use_kernels says."""
    if not is_square(x) or in_float16(x):
        out: Tensor = original_forward(self)(self, x, mask, use_kernels)
        return out
    return _update(self, x, mask)


def boltz_before_kernels(self: Any, x: Tensor, mask: Tensor) -> Tensor:
    """The forward of Boltz up to 2.0."""
    if not is_square(x) or in_float16(x):
        out: Tensor = original_forward(self)(self, x, mask)
        return out
    return _update(self, x, mask)


def _update(layer: Any, x: Tensor, mask: Tensor) -> Tensor:
    z, pairs = squares(x, mask)
    update = triangle_multiplication(
        z,
        pairs,
        TriangleMultiplication.weights(layer),
        _direction(layer),
        eps=layer.norm_in.eps,
        config=layer.kernel_config,
    )
    return update.reshape(x.shape)


def _direction(layer: nn.Module) -> Direction:
    kind = class_among(layer, _DIRECTIONS)
    assert kind is not None  # recognised
    return _DIRECTIONS[kind.__name__]


ADAPTER = BoltzTriangleMultiplication()
