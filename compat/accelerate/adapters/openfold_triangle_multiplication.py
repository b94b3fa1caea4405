"""Triangle multiplication of OpenFold, fused projections or not, and of those who have copied it.

Jumper et al. 2021, Supplementary Algorithms 11 and 12. With `inplace_safe`, which OpenFold sets whenever gradients are
off, the layer changes z itself and gives z back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.registry.binding import Use
from ....kernels.triangle_multiplication import Direction, Weights, triangle_multiplication
from ..checks import class_among, require_children, require_exactly, require_parameters, require_signature
from ..recognition import Adapter, Declined, Example, Forward, Recognised
from ..replacement import original_forward
from ._openfold import HALF, in_float16, require_linears, require_norms
from ._pairs import is_square, pair_example, squares


class OpenFoldTriangleMultiplication(Adapter):
    """`TriangleMultiplicationOutgoing`, `...Incoming`, and both with their projections fused."""

    title = "OpenFold's triangle multiplication"
    operations = ("triangle_multiplication",)
    classes = (
        "TriangleMultiplicativeUpdate",
        "TriangleMultiplicationOutgoing",
        "TriangleMultiplicationIncoming",
        "FusedTriangleMultiplicativeUpdate",
        "FusedTriangleMultiplicationOutgoing",
        "FusedTriangleMultiplicationIncoming",
        "EsmFoldTriangleMultiplicativeUpdate",
    )
    projects = ("OpenFold", "RhoFold", "Genie 2", "ESMFold of Hugging Face")
    parameters = ("linear_g.weight", "linear_z.weight", "layer_norm_in.weight", "layer_norm_out.weight")

    def recognise(self, module: nn.Module) -> Recognised:
        """See the class."""
        layer: Any = module
        if not isinstance(getattr(module, "_outgoing", None), bool):
            raise Declined("it does not say whether it is `_outgoing`")
        if _direction(module) is None:
            raise Declined(f"its name and its `_outgoing`, which is {layer._outgoing}, do not agree")
        fused = hasattr(module, "linear_ab_p")
        packed = ("linear_ab_p", "linear_ab_g") if fused else ("linear_a_p", "linear_a_g", "linear_b_p", "linear_b_g")
        linears = (*packed, "linear_g", "linear_z")
        require_linears(module, linears)
        require_children(module, (*linears, "layer_norm_in", "layer_norm_out", "sigmoid"))
        width, hidden = layer.linear_z.weight.shape
        shapes: dict[str, tuple[int, ...]] = {name + ".weight": (hidden * (1 + fused), width) for name in packed}
        shapes |= {"linear_g.weight": (width, width), "linear_z.weight": (width, hidden)}
        biases = {name.removesuffix("weight") + "bias": shape[:1] for name, shape in shapes.items()}
        shapes |= {f"layer_norm_in.{name}": (width,) for name in ("weight", "bias")}
        shapes |= {f"layer_norm_out.{name}": (hidden,) for name in ("weight", "bias")}
        require_parameters(module, shapes, biases)
        if getattr(module, "c_z", width) != width or getattr(module, "c_hidden", hidden) != hidden:
            raise Declined(f"its weights have {width} and {hidden} channels, its attributes say others")
        if require_norms(module, ("layer_norm_in",), width) != require_norms(module, ("layer_norm_out",), hidden):
            raise Declined("its LayerNorms have several epsilons")
        require_exactly(module, sigmoid=nn.Sigmoid)
        forms: dict[str, Forward] = {
            "z mask= inplace_safe= _add_with_inplace= _inplace_chunk_size=": openfold,
            "z mask=": vendored,
        }
        taken = require_signature(module, *forms)
        form = "OpenFold" if "inplace_safe" in taken else "OpenFold as vendored"
        return Recognised(form + ", fused projections" * fused, forms[taken], uses, (HALF,))

    def example(self, module: nn.Module, generator: torch.Generator) -> Example:
        """See the class."""
        layer: Any = module
        return pair_example(layer.linear_g.in_features, generator)


def uses(layer: Any) -> list[Use]:
    """Triangle multiplication, at the layer's sizes."""
    width, hidden = layer.linear_z.weight.shape
    options = () if layer.linear_z.bias is None else ("bias",)
    return [Use("triangle_multiplication", {"cz": width, "c": hidden}, options)]


def openfold(
    self: Any,
    z: Tensor,
    mask: Tensor | None = None,
    inplace_safe: bool = False,
    _add_with_inplace: bool = False,
    _inplace_chunk_size: int | None = 256,
) -> Tensor:
    """OpenFold's forward. In place, z becomes z plus the update, or the update, and z itself is given back."""
    if not _served(z) or (inplace_safe and _inplace_chunk_size is None):
        out: Tensor = original_forward(self)(self, z, mask, inplace_safe, _add_with_inplace, _inplace_chunk_size)
        return out
    update = _update(self, z, mask)
    if not inplace_safe:
        return update
    if _add_with_inplace:
        z += update
        return z
    if hasattr(self, "linear_ab_p"):  # the fused form leaves z alone here
        return update
    return z.copy_(update)


def vendored(self: Any, z: Tensor, mask: Tensor | None = None) -> Tensor:
    """The forward of OpenFold as other projects keep it."""
    if not _served(z):
        out: Tensor = original_forward(self)(self, z, mask)
        return out
    return _update(self, z, mask)


def _served(z: Tensor) -> bool:
    return is_square(z) and not in_float16(z)


def _update(layer: Any, z: Tensor, mask: Tensor | None) -> Tensor:
    pairs, allowed = squares(z, mask)
    if hasattr(layer, "linear_ab_p"):
        p_in, g_in = _joined(layer.linear_ab_p), _joined(layer.linear_ab_g)
    else:
        p_in, g_in = _joined(layer.linear_a_p, layer.linear_b_p), _joined(layer.linear_a_g, layer.linear_b_g)
    weights = Weights(
        norm_in_weight=layer.layer_norm_in.weight,
        norm_in_bias=layer.layer_norm_in.bias,
        p_in=p_in[0],
        g_in=g_in[0],
        norm_out_weight=layer.layer_norm_out.weight,
        norm_out_bias=layer.layer_norm_out.bias,
        p_out=layer.linear_z.weight,
        g_out=layer.linear_g.weight,
        p_in_bias=p_in[1],
        g_in_bias=g_in[1],
        p_out_bias=layer.linear_z.bias,
        g_out_bias=layer.linear_g.bias,
    )
    direction = _direction(layer)
    assert direction is not None  # recognised
    update = triangle_multiplication(
        pairs, allowed, weights, direction, eps=layer.layer_norm_in.eps, config=layer.kernel_config
    )
    return update.reshape(z.shape)


def _direction(layer: Any) -> Direction | None:
    """Which edges; None where that cannot be told.

    What Multiflow and FrameFlow keep of OpenFold always says `_outgoing`: there each class has a product of its own,
    and the name counts.
    """
    kind = class_among(layer, OpenFoldTriangleMultiplication.classes) or type(layer)
    said: Direction = "outgoing" if layer._outgoing else "incoming"
    named: Direction = said
    if kind.__name__.endswith(("Outgoing", "Incoming")):
        named = "outgoing" if kind.__name__.endswith("Outgoing") else "incoming"
    return named if named == said or "_combine_projections" in vars(kind) else None


def _joined(*layers: Any) -> tuple[Tensor, Tensor | None]:
    """The weights of linear layers, and their biases if they have any, one below the other."""
    if len(layers) == 1:
        return layers[0].weight, layers[0].bias
    biases = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return torch.cat([layer.weight for layer in layers]), biases


ADAPTER = OpenFoldTriangleMultiplication()
