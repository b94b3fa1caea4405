"""The transition of Boltz: a gated perceptron on every token or pair.

Abramson et al. 2024, Supplementary Algorithm 11. No operation stands behind it: where no backward pass follows, it goes
over a few rows at a time, and the wide tensor between its layers is never held as a whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.registry.binding import Use
from ....modules.transition import by_rows, gated
from ..checks import (
    require_children,
    require_exactly,
    require_layer_norm,
    require_linear,
    require_parameters,
    require_signature,
    whole_numbers,
)
from ..recognition import Adapter, Example, Recognised


class BoltzTransition(Adapter):
    """`Transition` of Boltz-1 and Boltz-2."""

    title = "transition"
    operations = ()
    classes = ("Transition",)
    projects = ("Boltz-1", "Boltz-2")
    parameters = ("norm.weight", "fc1.weight", "fc2.weight", "fc3.weight")

    def recognise(self, module: nn.Module) -> Recognised:
        """See the class."""
        hidden = whole_numbers(module, "hidden")["hidden"]
        require_linear(module, "fc1", "fc2", "fc3")
        layer: Any = module
        width, out = layer.fc1.in_features, layer.fc3.out_features
        require_parameters(
            module,
            {
                "norm.weight": (width,),
                "norm.bias": (width,),
                "fc1.weight": (hidden, width),
                "fc2.weight": (hidden, width),
                "fc3.weight": (out, hidden),
            },
        )
        require_layer_norm(module, "norm", width)
        require_exactly(module, silu=nn.SiLU)
        require_children(module, ("norm", "fc1", "fc2", "fc3", "silu"))
        require_signature(module, "x chunk_size=")
        return Recognised("Boltz", boltz, uses)

    def example(self, module: nn.Module, generator: torch.Generator) -> Example:
        """See the class."""
        layer: Any = module
        x = torch.randn(2, 7, layer.fc1.in_features, generator=generator)
        return Example(args=(x,), compare=lambda out: {"out": out}, leaves={"x": x})


def uses(layer: Any) -> list[Use]:  # noqa: ARG001: the forward calls no operation
    """None."""
    return []


def boltz(self: Any, x: Tensor, chunk_size: int | None = None) -> Tensor:  # noqa: ARG001: rows fit the machine
    """Boltz's forward."""
    return by_rows(x, self.hidden, gated, self)


ADAPTER = BoltzTransition()
