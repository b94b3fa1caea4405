"""The pair transition of OpenFold and of those who have copied it.

Jumper et al. 2021, Supplementary Algorithm 15. No operation stands behind it: where no backward pass follows, it goes
over a few rows at a time, and the wide tensor between its layers is never held as a whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.registry.binding import Use
from ....modules.transition import by_rows
from ..checks import require_children, require_exactly, require_parameters, require_signature, whole_numbers
from ..recognition import Adapter, Example, Forward, Recognised
from ._openfold import require_linears, require_norms
from ._pairs import pair_example


class OpenFoldPairTransition(Adapter):
    """`PairTransition` of OpenFold."""

    title = "pair transition"
    operations = ()
    classes = ("PairTransition",)
    projects = ("OpenFold", "RhoFold", "Genie 2")
    parameters = ("layer_norm.weight", "linear_1.weight", "linear_2.weight")

    def recognise(self, module: nn.Module) -> Recognised:
        """See the class."""
        size = whole_numbers(module, "c_z", "n")
        width, hidden = size["c_z"], size["c_z"] * size["n"]
        shapes: dict[str, tuple[int, ...]] = {"linear_1.weight": (hidden, width), "linear_2.weight": (width, hidden)}
        shapes |= {"linear_1.bias": (hidden,), "linear_2.bias": (width,)}
        require_parameters(module, shapes | {"layer_norm.weight": (width,), "layer_norm.bias": (width,)})
        require_linears(module, ("linear_1", "linear_2"))
        require_norms(module, ("layer_norm",), width)
        require_exactly(module, relu=nn.ReLU)
        require_children(module, ("layer_norm", "linear_1", "linear_2", "relu"))
        forms: dict[str, tuple[str, Forward]] = {
            "z mask= chunk_size=": ("OpenFold", openfold),
            "z mask=": ("Genie 2", genie),
        }
        form, forward = forms[require_signature(module, *forms)]
        return Recognised(form, forward, uses)

    def example(self, module: nn.Module, generator: torch.Generator) -> Example:
        """See the class."""
        layer: Any = module
        return pair_example(layer.c_z, generator)


def uses(layer: Any) -> list[Use]:  # noqa: ARG001: the forward calls no operation
    """None."""
    return []


def openfold(self: Any, z: Tensor, mask: Tensor | None = None, chunk_size: int | None = None) -> Tensor:
    """OpenFold's forward; the rows of a block fit the machine, whatever chunk_size says."""
    return _update(self, z, mask)


def genie(self: Any, z: Tensor, mask: Tensor | None = None) -> Tensor:
    """Genie 2's forward."""
    return _update(self, z, mask)


def _update(layer: Any, z: Tensor, mask: Tensor | None) -> Tensor:
    update = by_rows(z, layer.linear_1.out_features, _perceptron, layer)
    if mask is None:
        return update
    # A fraction is a fraction here. In place only what no backward pass asks for.
    return update * mask.unsqueeze(-1) if torch.is_grad_enabled() else update.mul_(mask.unsqueeze(-1))


def _perceptron(layer: Any, rows: Tensor) -> Tensor:
    hidden = layer.linear_1(layer.layer_norm(rows))
    out: Tensor = layer.linear_2(F.relu(hidden) if torch.is_grad_enabled() else F.relu_(hidden))
    return out


ADAPTER = OpenFoldPairTransition()
