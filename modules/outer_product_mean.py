"""The outer product mean: from a sequence alignment to an update of the pair representation."""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from ..kernels.common.blocking import pairs_per_block, slices
from .linear import Linear
from .masks import boolean

_USUAL_WIDTH = 128  # what `pairs_per_block` reckons with


class OuterProductMean(nn.Module):
    """Jumper et al. 2021, Supplementary Algorithm 10, with the parameters and arguments of Boltz's layer.

    Args:
        c_in: Width of the alignment's representation.
        c_hidden: Width of each factor.
        c_out: Width of the pair representation.
    """

    def __init__(self, c_in: int, c_hidden: int, c_out: int) -> None:
        super().__init__()
        self.c_hidden = c_hidden
        self.norm = nn.LayerNorm(c_in)
        self.proj_a = nn.Linear(c_in, c_hidden, bias=False)
        self.proj_b = nn.Linear(c_in, c_hidden, bias=False)
        self.proj_o = Linear(c_hidden * c_hidden, c_out, init="final")

    def forward(
        self, m: Float[Tensor, "b s n c_in"], mask: Shaped[Tensor, "b s n"], chunk_size: int | None = None
    ) -> Float[Tensor, "b n n c_out"]:
        """Compute the update; where no backward pass follows, a few rows of it at a time.

        Args:
            m: The alignment's representation.
            mask: 1 (or True) for the residues of each sequence that are there.
            chunk_size: Ignored: the rows of a block fit the machine.

        Raises:
            ValueError: The mask does not fit m.
        """
        if tuple(mask.shape) != tuple(m.shape[:3]):
            raise ValueError(
                f"OuterProductMean: the mask has shape {tuple(mask.shape)}; with m {tuple(m.shape)} it must be "
                f"{tuple(m.shape[:3])}"
            )
        there = boolean(mask)
        m = self.norm(m)
        a, b = (layer(m).masked_fill(~there[..., None], 0.0) for layer in (self.proj_a, self.proj_b))
        n = m.shape[2]
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # a loop would compile one graph for each length
            return self._rows(a, b, there, slice(0, n))
        # A pair has c_hidden squared products before they are projected.
        size = max(1, pairs_per_block(m) * _USUAL_WIDTH // (self.c_hidden**2 * max(1, n) * len(m)))
        out = None
        for rows in slices(n, size):
            block = self._rows(a, b, there, rows)
            if out is None:
                out = block.new_empty(len(m), n, n, block.shape[-1])
            out[:, rows] = block
        return self._rows(a, b, there, slice(0, n)) if out is None else out

    def _rows(
        self, a: Float[Tensor, "b s n c"], b: Float[Tensor, "b s n c"], there: Bool[Tensor, "b s n"], rows: slice
    ) -> Float[Tensor, "b r n c_out"]:
        products = torch.einsum("bsic,bsjd->bijcd", a[:, :, rows], b).flatten(3)
        dtype = products.dtype if products.dtype is torch.float64 else torch.float32
        # How many sequences have both residues; a matrix product, exact in float32.
        both = torch.einsum("bsi,bsj->bij", there[:, :, rows].to(dtype), there.to(dtype)).clamp(min=1)
        mean = products / both[..., None]
        out: Tensor = self.proj_o(mean.to(a.dtype))
        return out
