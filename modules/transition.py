"""The transition: a gated perceptron on every token or pair."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.blocks import pairs_per_block, slices
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
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # a loop would compile one graph for each length
            return self._rows(x)
        flat = x.reshape(-1, x.shape[-1])
        size = max(1, pairs_per_block(x) * _USUAL_WIDTH // self.hidden)
        if len(flat) <= size:
            return self._rows(x)
        out = None
        for rows in slices(len(flat), size):
            block = self._rows(flat[rows])
            if out is None:
                out = block.new_empty(len(flat), block.shape[-1])  # the type that autocast gave it
            out[rows] = block
        assert out is not None
        return out.view(*x.shape[:-1], -1)

    def _rows(self, x: Float[Tensor, "*b dim"]) -> Float[Tensor, "*b out_dim"]:
        x = self.norm(x)
        gate = self.fc1(x)
        # In place only what no backward pass asks for.
        hidden = F.silu(gate) * self.fc2(x) if torch.is_grad_enabled() else F.silu(gate, inplace=True).mul_(self.fc2(x))
        out: Tensor = self.fc3(hidden)
        return out
