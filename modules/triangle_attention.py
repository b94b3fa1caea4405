"""Triangle attention as a layer, around the starting and around the ending node."""

from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from ..kernels.registry.binding import Use
from ..kernels.triangle_attention import triangle_attention
from ..kernels.triangle_attention_update import Weights, triangle_attention_update
from .kernel_module import KernelModule
from .linear import Linear
from .masks import boolean
from .pair_shapes import check_square


class TriangleAttention(KernelModule):
    """Jumper et al. 2021, Supplementary Algorithms 13 and 14, with the parameters and arguments of Boltz's layer.

    Args:
        c_in: Width of the pair representation.
        c_hidden: Channels of a head.
        no_heads: Heads.
        starting: Attend along rows, around the starting node; otherwise along columns, around the ending node.
        inf: Accepted for the original's sake; masks are exact here.
    """

    def __init__(self, c_in: int, c_hidden: int, no_heads: int, starting: bool = True, inf: float = 1e9) -> None:
        super().__init__()
        if c_hidden < 1 or no_heads < 1:
            raise ValueError(f"TriangleAttention: c_hidden and no_heads must be positive, not {c_hidden}, {no_heads}")
        self.c_in, self.c_hidden, self.no_heads = c_in, c_hidden, no_heads
        self.starting, self.inf = starting, inf
        self.layer_norm = nn.LayerNorm(c_in)
        self.linear = Linear(c_in, no_heads, bias=False)
        nn.init.kaiming_normal_(self.linear.weight, nonlinearity="linear")
        self.mha = _Projections(c_in, c_hidden * no_heads)
        self.reads("layer_norm", "linear", "mha")

    def kernel_uses(self) -> list[Use]:
        """Triangle attention."""
        return [Use("triangle_attention", {"h": self.no_heads, "d": self.c_hidden})]

    def weights(self) -> Weights:
        """The operation's weights."""
        return Weights(
            norm_weight=self.layer_norm.weight,
            norm_bias=self.layer_norm.bias,
            bias=self.linear.weight,
            q=self.mha.linear_q.weight,
            k=self.mha.linear_k.weight,
            v=self.mha.linear_v.weight,
            gate=self.mha.linear_g.weight,
            out=self.mha.linear_o.weight,
        )

    def forward(
        self,
        x: Float[Tensor, "*b n n c_in"],
        mask: Shaped[Tensor, "*b n n"] | None = None,
        chunk_size: int | None = None,
        use_kernels: bool = False,
    ) -> Float[Tensor, "*b n n c_in"]:
        """Compute the update of the pair representation.

        Args:
            x: Pair representation.
            mask: 1 (or True) for pairs that take part as keys. A row without any attends to nothing and gets zeros,
                where the original averages over all keys.
            chunk_size: Ignored: kernels stream over rows in blocks that fit the machine.
            use_kernels: Ignored: the configuration that `bind` set chooses the kernel.

        Returns:
            The update, without x itself.

        Raises:
            ValueError: x is no square of c_in channels, or the mask does not fit it.
        """
        check_square(type(self).__name__, x, self.c_in, mask)
        square = x.shape[-3:]
        z, pairs = x.reshape(-1, *square), None if mask is None else boolean(mask.reshape(-1, *square[:2]))
        if not self.may_read():
            return self._called(z, pairs).reshape(x.shape)
        update = triangle_attention_update(
            z,
            pairs,
            self.weights(),
            ending=not self.starting,
            eps=self.layer_norm.eps,
            config=self.kernel_config,
        )
        return update.reshape(x.shape)

    def _called(
        self, z: Float[Tensor, "b n n c_in"], mask: Bool[Tensor, "b n n"] | None
    ) -> Float[Tensor, "b n n c_in"]:
        """Layers around the attention alone."""
        if not self.starting:
            z, mask = z.transpose(1, 2), None if mask is None else mask.transpose(1, 2)
        x, mha = self.layer_norm(z), self.mha
        q, k, v = (
            layer(x).unflatten(-1, (self.no_heads, -1)).permute(0, 3, 1, 2, 4)
            for layer in (mha.linear_q, mha.linear_k, mha.linear_v)
        )
        bias = self.linear(x).permute(0, 3, 1, 2)
        attended = triangle_attention(q, k, v, bias, mask, config=self.kernel_config).permute(0, 2, 3, 1, 4).flatten(3)
        out: Tensor = mha.linear_o(attended * mha.linear_g(x).sigmoid())
        return out if self.starting else out.transpose(1, 2)


TriangleAttentionStartingNode = TriangleAttention


class TriangleAttentionEndingNode(TriangleAttention):
    """Supplementary Algorithm 14: `TriangleAttention` along columns."""

    def __init__(self, c_in: int, c_hidden: int, no_heads: int, *, starting: bool = False, inf: float = 1e9) -> None:
        super().__init__(c_in, c_hidden, no_heads, starting, inf)


class _Projections(nn.Module):
    """The attention's linear layers, under the names of OpenFold's and Boltz's `mha`. It has no forward of its own."""

    def __init__(self, c_in: int, c_heads: int) -> None:
        super().__init__()
        self.linear_q = Linear(c_in, c_heads, bias=False)
        self.linear_k = Linear(c_in, c_heads, bias=False)
        self.linear_v = Linear(c_in, c_heads, bias=False)
        self.linear_o = Linear(c_heads, c_in, bias=False, init="final")
        # A weight of zero: every gate starts half open.
        self.linear_g = Linear(c_in, c_heads, bias=False, init="final")
        for layer in (self.linear_q, self.linear_k, self.linear_v):
            nn.init.xavier_uniform_(layer.weight)
