"""The transition: a gated perceptron on every token or pair."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.common.blocking import pairs_per_block, slices
from .linear import Linear

_USUAL_WIDTH = 128  # what `pairs_per_block` reckons with


class Transition(nn.Module):
    """Abramson et al. 2024, Supplementary Algorithm 11 (SwiGLU), with the parameters and arguments of Boltz's layer.

    Args:
        dim: Width of the input.
        hidden: Width between the layers.
        out_dim: Width of the output; that of the input when None.
    """

    def __init__(self, dim: int = 128, hidden: int = 512, out_dim: int | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = Linear(dim, hidden, bias=False)
        self.fc2 = Linear(dim, hidden, bias=False)
        self.fc3 = Linear(hidden, dim if out_dim is None else out_dim, bias=False, init="final")
        self.hidden = hidden

    def forward(self, x: Float[Tensor, "*b dim"], chunk_size: int | None = None) -> Float[Tensor, "*b out_dim"]:
        """Apply the layer; where no backward pass follows, to a few rows at a time.

        Args:
            x: Tokens or pairs.
            chunk_size: Ignored: the rows of a block fit the machine.
        """
        return by_rows(x, self.hidden, gated, self)


# The forward's parts, for a layer of this class, or of another project's class with the same parameters ------------


def gated(layer: Any, x: Float[Tensor, "*b dim"]) -> Float[Tensor, "*b out_dim"]:
    """LayerNorm, and the perceptron with its gate."""
    x = layer.norm(x)
    gate = layer.fc1(x)
    # In place only what no backward pass asks for.
    hidden = F.silu(gate) * layer.fc2(x) if torch.is_grad_enabled() else F.silu(gate, inplace=True).mul_(layer.fc2(x))
    out: Tensor = layer.fc3(hidden)
    return out


def by_rows(
    x: Float[Tensor, "*b dim"], hidden: int, function: Callable[[Any, Tensor], Tensor], layer: Any
) -> Float[Tensor, "*b out_dim"]:
    """Apply a function of a layer and of rows; where no backward pass follows, to a few rows at a time.

    Args:
        x: Tokens or pairs.
        hidden: Channels of the widest tensor between.
        function: From the layer and rows [rows, dim] to [rows, out_dim].
        layer: Its first argument.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # a loop would compile one graph for each length
        return function(layer, x)
    flat = x.reshape(-1, x.shape[-1])
    size = max(1, pairs_per_block(x) * _USUAL_WIDTH // hidden)
    if len(flat) <= size:
        return function(layer, x)
    out = None
    for rows in slices(len(flat), size):
        block = function(layer, flat[rows])
        if out is None:
            out = block.new_empty(len(flat), block.shape[-1])  # the type that autocast gave it
        out[rows] = block
    assert out is not None
    return out.view(*x.shape[:-1], -1)
