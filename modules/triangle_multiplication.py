"""The triangle multiplicative update as a layer, from outgoing and from incoming edges."""

from typing import ClassVar

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ..kernels.registry.binding import Use
from ..kernels.triangle_multiplication import Direction, Weights, triangle_multiplication
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
        self.norm_in = nn.LayerNorm(dim)
        self.p_in = Linear(dim, 2 * dim, bias=False)
        # Weights of zero: every gate starts half open.
        self.g_in = Linear(dim, 2 * dim, bias=False, init="final")
        self.norm_out = nn.LayerNorm(dim)
        self.p_out = Linear(dim, dim, bias=False, init="final")
        self.g_out = Linear(dim, dim, bias=False, init="final")

    def kernel_uses(self) -> list[Use]:
        """Triangle multiplication."""
        return [Use("triangle_multiplication", {"cz": self.g_out.in_features, "c": self.p_out.in_features})]

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
        check_square(type(self).__name__, x, self.g_out.in_features, mask)
        square = x.shape[-3:]
        update = triangle_multiplication(
            x.reshape(-1, *square),
            None if mask is None else boolean(mask.reshape(-1, *square[:2])),
            self.weights(),
            self.direction,
            eps=self.norm_in.eps,
            config=self.kernel_config,
        )
        return update.reshape(x.shape)


class TriangleMultiplicationOutgoing(TriangleMultiplication):
    """Jumper et al. 2021, Supplementary Algorithm 11: edge (i, j) from the edges (i, k) and (j, k)."""

    direction = "outgoing"


class TriangleMultiplicationIncoming(TriangleMultiplication):
    """Jumper et al. 2021, Supplementary Algorithm 12: edge (i, j) from the edges (k, i) and (k, j)."""

    direction = "incoming"
