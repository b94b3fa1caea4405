"""The sequence transformer of Multiflow's trunk: `nn.TransformerEncoder`'s parameters, our attention."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.attention import attention
from ..kernels.registry.binding import Use
from .kernel_module import KernelModule


class SelfAttention(KernelModule):
    """Multi-head self-attention with the parameters of `nn.MultiheadAttention`.

    Args:
        c: Width.
        heads: Heads, each of c // heads channels.
        dropout: Probability of dropping an attention weight in training.

    Raises:
        ValueError: `c` is not a multiple of `heads`.
    """

    def __init__(self, c: int, heads: int, dropout: float) -> None:
        super().__init__()
        if heads < 1 or c % heads:
            raise ValueError(f"a width of {c} cannot be shared among {heads} heads")
        self.c, self.heads, self.dropout = c, heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * c, c))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * c))
        self.out_proj = nn.Linear(c, c)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def kernel_uses(self) -> list[Use]:
        """Attention; with dropout when training."""
        dims = {"h": self.heads, "d": self.c // self.heads}
        return [Use("attention", dims), *([Use("attention", dims, ("dropout",))] if self.dropout > 0 else [])]

    def forward(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
        """Attend over the tokens that are there."""
        b, n, _ = x.shape
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(b, n, 3, self.heads, -1).unbind(2)
        out = attention(q, k, v, mask, dropout=self.dropout if self.training else 0.0, config=self.kernel_config)
        projected: Tensor = self.out_proj(out.reshape(b, n, -1))
        return projected


class SequenceTransformerLayer(nn.Module):
    """One post-norm layer (Vaswani et al. 2017), named as `nn.TransformerEncoderLayer` names it.

    Args:
        c: Width, also of the feed-forward layer.
        heads: Attention heads.
        dropout: Probability, for attention weights and both branches.
    """

    def __init__(self, c: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = SelfAttention(c, heads, dropout)
        self.linear1 = nn.Linear(c, c)
        self.linear2 = nn.Linear(c, c)
        self.norm1 = nn.LayerNorm(c)
        self.norm2 = nn.LayerNorm(c)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
        """Attention, then the feed-forward layer, each with its residual connection and LayerNorm."""
        x = self.norm1(x + self.dropout(self.self_attn(x, mask)))
        hidden = self.dropout(F.relu(self.linear1(x)))
        out: Tensor = self.norm2(x + self.dropout(self.linear2(hidden)))
        return out


class SequenceTransformer(nn.Module):
    """Layers over the sequence, named as `nn.TransformerEncoder` names them.

    Args:
        c: Width.
        heads: Attention heads.
        layers: Layers.
        dropout: Probability.
    """

    def __init__(self, c: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SequenceTransformerLayer(c, heads, dropout) for _ in range(layers))

    def forward(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
        """Update the sequence; rows of tokens that are not there hold nothing of meaning."""
        for layer in self.layers:
            x = layer(x, mask)
        return x
