"""Edge transition of the FrameDiff lineage (Yim et al. 2023): `(node_embed, edge_embed)`, no mask and no residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.registry.binding import Use
from ....modules.edge_transition import pair_transition_use, update_pairs
from ..autocasting import layer_norm_type
from ..checks import (
    require_children,
    require_exactly,
    require_layer_norm,
    require_linear,
    require_parameters,
    require_signature,
)
from ..recognition import Adapter, Declined, Example, Forward, Recognised
from ..replacement import original_forward

_LAYERS = ("initial_embed", "trunk.0", "trunk.2", "final_layer")


class EdgeTransition(Adapter):
    """`EdgeTransition` as six projects have it, and FlashIPA's in its two-dimensional mode."""

    title = "edge transition"
    operations = ("edge_transition",)
    classes = ("EdgeTransition",)
    projects = ("Multiflow", "FrameFlow", "FrameDiff", "FoldFlow", "RNA-FrameFlow", "cogeneration", "FlashIPA")
    parameters = tuple(f"{name}.weight" for name in (*_LAYERS, "layer_norm"))

    def recognise(self, module: nn.Module) -> Recognised:
        """See the class."""
        layer: Any = module
        form, forward, notes = _form(module)
        require_linear(module, *_LAYERS)
        require_exactly(module, trunk=nn.Sequential, trunk__1=nn.ReLU, trunk__3=nn.ReLU)
        require_children(layer.trunk, "0123")
        share, width = layer.initial_embed.weight.shape
        hidden, out = layer.trunk[0].in_features, layer.final_layer.out_features
        if hidden <= 2 * share:
            raise Declined(f"its trunk takes {hidden} channels, no more than the two residues' {2 * share}")
        shapes: dict[str, tuple[int, ...]] = {"layer_norm.weight": (out,), "layer_norm.bias": (out,)}
        expected = ((share, width), (hidden, hidden), (hidden, hidden), (out, hidden))
        for name, shape in zip(_LAYERS, expected, strict=True):
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        require_parameters(module, shapes)
        require_layer_norm(module, "layer_norm", out)
        return Recognised(form, forward, uses, notes, calls=("initial_embed",))

    def example(self, module: nn.Module, generator: torch.Generator) -> Example:
        """See the class."""
        layer: Any = module
        sizes = pair_transition_use(layer).dims
        nodes = torch.randn(2, 11, layer.initial_embed.in_features, generator=generator)
        z = torch.randn(2, 11, 11, sizes["cz"], generator=generator)
        return Example(
            args=(nodes, z), compare=lambda out: {"edge_embed": out}, leaves={"node_embed": nodes, "edge_embed": z}
        )


def _form(module: nn.Module) -> tuple[str, Forward, tuple[str, ...]]:
    taken = require_signature(module, "node_embed edge_embed", "node_embed edge_embed z_factor_1= z_factor_2=")
    if "z_factor_1" not in taken:
        return "FrameDiff lineage", two_dimensional, ()
    if getattr(module, "mode", None) != "2d":
        raise Declined("it updates two factors of the pair representation, which is another function")
    return "FlashIPA's 2d", two_dimensional_or_factors, ()


def uses(layer: Any) -> list[Use]:
    """The edge transition, at the layer's sizes."""
    return [pair_transition_use(layer)]


def two_dimensional(self: Any, node_embed: Tensor, edge_embed: Tensor) -> Tensor:
    """The forward of the FrameDiff lineage."""
    out = update_pairs(self, node_embed, edge_embed)
    return out.to(layer_norm_type(self.layer_norm, edge_embed))


def two_dimensional_or_factors(
    self: Any,
    node_embed: Tensor,
    edge_embed: Tensor | None,
    z_factor_1: Tensor | None = None,
    z_factor_2: Tensor | None = None,
) -> Any:
    """The forward of FlashIPA's layer: without pairs its own runs."""
    if edge_embed is None:
        return original_forward(self)(self, node_embed, edge_embed, z_factor_1, z_factor_2)
    return two_dimensional(self, node_embed, edge_embed)


ADAPTER = EdgeTransition()
