"""Pair-weighted averaging: an alignment's rows, averaged with weights from the pair representation."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ..kernels.attention_pair_bias import pair_bias
from .children import ChildGuard, may_read
from .linear import Linear
from .masks import boolean
from .pair_shapes import check_square


class PairWeightedAveraging(nn.Module):
    """Abramson et al. 2024, Supplementary Algorithm 10, with the parameters and arguments of Boltz's layer.

    Args:
        c_m: Width of the alignment's representation.
        c_z: Width of the pair representation.
        c_h: Channels of a head.
        num_heads: Heads.
        inf: Accepted for the original's sake; masks are exact here.
    """

    def __init__(self, c_m: int, c_z: int, c_h: int, num_heads: int, inf: float = 1e6) -> None:
        super().__init__()
        self.c_m, self.c_z, self.c_h, self.num_heads, self.inf = c_m, c_z, c_h, num_heads, inf
        self.norm_m = nn.LayerNorm(c_m)
        self.norm_z = nn.LayerNorm(c_z)
        self.proj_m = nn.Linear(c_m, c_h * num_heads, bias=False)
        self.proj_g = nn.Linear(c_m, c_h * num_heads, bias=False)
        self.proj_z = nn.Linear(c_z, num_heads, bias=False)
        self.proj_o = Linear(c_h * num_heads, c_m, bias=False, init="final")
        self.child_guard = ChildGuard(self, only=("norm_z", "proj_z"))

    def forward(
        self,
        m: Float[Tensor, "b s n c_m"],
        z: Float[Tensor, "b n n c_z"],
        mask: Shaped[Tensor, "b n n"],
        chunk_heads: bool = False,
    ) -> Float[Tensor, "b s n c_m"]:
        """Compute the update of the alignment's representation.

        Args:
            m: The alignment's representation.
            z: Pair representation.
            mask: 1 (or True) for pairs (i, j) where j counts in i's average. A row without any gets zeros.
            chunk_heads: Ignored: the weights take heads / c_z of the pair representation's memory.

        Raises:
            ValueError: z is no square, or the mask does not fit it.
        """
        check_square("PairWeightedAveraging", z, self.c_z, mask)
        m = self.norm_m(m)
        values = self.proj_m(m).unflatten(-1, (self.num_heads, self.c_h))
        keys = boolean(mask)[:, None]
        empty = ~keys.any(-1, keepdim=True)
        logits = self._bias(z).masked_fill(~keys & ~empty, -torch.inf)
        weights = logits.softmax(-1).masked_fill(empty, 0.0).to(values.dtype)
        averaged = torch.einsum("bhij,bsjhd->bsihd", weights, values).flatten(3)
        out: Tensor = self.proj_o(self.proj_g(m).sigmoid() * averaged)
        return out

    def _bias(self, z: Float[Tensor, "b n n c_z"]) -> Float[Tensor, "b h n n"]:
        # The streamed projection has no second derivative.
        if torch.is_grad_enabled() or not may_read(self, self.child_guard):
            bias: Tensor = self.proj_z(self.norm_z(z)).permute(0, 3, 1, 2)
            return bias
        return pair_bias(z, self.norm_z.weight, self.norm_z.bias, self.proj_z.weight, self.norm_z.eps)
