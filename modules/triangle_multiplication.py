"""The triangle multiplicative update as a layer, from outgoing and from incoming edges."""

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from ..kernels.dtypes import cast, floating_type
from ..kernels.registry.binding import Use
from ..kernels.triangle_multiplication import Direction, Weights, triangle_multiplication
from ..kernels.triangle_multiplication.reference import TRIANGLES
from .kernel_module import KernelModule
from .linear import Linear
from .masks import boolean
from .pair_shapes import check_square


class TriangleMultiplication(KernelModule):
    """What both directions share: the parameters and arguments of Boltz's layers.

    Args:
        dim: Width of the pair representation.
    """

    direction: ClassVar[Direction]

    def __init__(self, dim: int = 128) -> None:
        super().__init__()
        self.dim = dim
        self.norm_in = nn.LayerNorm(dim)
        self.p_in = Linear(dim, 2 * dim, bias=False)
        # Weights of zero: every gate starts half open.
        self.g_in = Linear(dim, 2 * dim, bias=False, init="final")
        self.norm_out = nn.LayerNorm(dim)
        self.p_out = Linear(dim, dim, bias=False, init="final")
        self.g_out = Linear(dim, dim, bias=False, init="final")
        self.reads("norm_in", "p_in", "g_in", "norm_out", "p_out", "g_out")

    def kernel_uses(self) -> list[Use]:
        """Triangle multiplication."""
        return [Use("triangle_multiplication", {"cz": self.dim, "c": self.dim})]

    def weights(self) -> Weights:
        """The operation's weights."""
        return Weights(
            norm_in_weight=self.norm_in.weight,
            norm_in_bias=self.norm_in.bias,
            p_in=self.p_in.weight,
            g_in=self.g_in.weight,
            norm_out_weight=self.norm_out.weight,
            norm_out_bias=self.norm_out.bias,
            p_out=self.p_out.weight,
            g_out=self.g_out.weight,
        )

    def forward(
        self,
        x: Float[Tensor, "*b n n dim"],
        mask: Shaped[Tensor, "*b n n"] | None,
        use_kernels: bool = False,
    ) -> Float[Tensor, "*b n n dim"]:
        """Compute the update of the pair representation.

        Args:
            x: Pair representation.
            mask: 1 (or True) for pairs that take part as edges of a triangle; None for all.
            use_kernels: Ignored: the configuration that `bind` set chooses the kernel.

        Returns:
            The update, without x itself.

        Raises:
            ValueError: x is no square of `dim` channels, or the mask does not fit it.
        """
        check_square(type(self).__name__, x, self.dim, mask)
        square = x.shape[-3:]
        z, pairs = x.reshape(-1, *square), None if mask is None else boolean(mask.reshape(-1, *square[:2]))
        if not self.may_read():
            return self._called(z, pairs).reshape(x.shape)
        update = triangle_multiplication(
            z,
            pairs,
            self.weights(),
            self.direction,
            eps=self.norm_in.eps,
            config=self.kernel_config,
        )
        return update.reshape(x.shape)

    def _called(self, z: Float[Tensor, "b n n dim"], mask: Bool[Tensor, "b n n"] | None) -> Float[Tensor, "b n n dim"]:
        """The operation's definition, of layers in place of weights."""
        x = self.norm_in(z)
        edges = self.p_in(x) * self.g_in(x).sigmoid()
        if mask is not None:
            edges = edges.masked_fill(~mask[..., None], 0.0)
        left, right = edges.chunk(2, dim=-1)
        product = torch.einsum(TRIANGLES[self.direction], left, right)
        out: Tensor = self.p_out(self.norm_out(product)) * self.g_out(x).sigmoid()
        return cast(out, floating_type(z))


class TriangleMultiplicationOutgoing(TriangleMultiplication):
    """Jumper et al. 2021, Supplementary Algorithm 11: edge (i, j) from the edges (i, k) and (j, k)."""

    direction = "outgoing"


class TriangleMultiplicationIncoming(TriangleMultiplication):
    """Jumper et al. 2021, Supplementary Algorithm 12: edge (i, j) from the edges (k, i) and (k, j)."""

    direction = "incoming"
