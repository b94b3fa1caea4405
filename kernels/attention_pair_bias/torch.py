"""Attention with a pair bias through PyTorch's fused attention: z is read once, its LayerNorm is never held."""

from jaxtyping import Bool, Float
from torch import Tensor

from ..common.pair_projection import PairProjection, project
from ..registry import register
from ..registry.types import KernelFunction, serves_everything
from ._streamed import attention_pair_bias_streamed


def run(
    q: Float[Tensor, "s n h d"],
    k: Float[Tensor, "s m h d"],
    v: Float[Tensor, "s m h d"],
    pairs: Float[Tensor, "b h n m"] | Float[Tensor, "b n m cz"],
    mask: Bool[Tensor, "s m"] | None = None,
    projection: PairProjection | None = None,
) -> Float[Tensor, "s n h d"]:
    """Project the bias, then attend: the sequences that share a bias are its rows."""
    bias = project(pairs, projection)
    b = bias.shape[0]
    # [s, n, h, d] to [b, h, s / b, n, d]
    q, k, v = (x.unflatten(0, (b, -1)).permute(0, 3, 1, 2, 4) for x in (q, k, v))
    out: Tensor = attention_pair_bias_streamed(q, k, v, bias, None if mask is None else mask.unflatten(0, (b, -1)))
    return out.permute(0, 2, 3, 1, 4).flatten(0, 1)


def load() -> KernelFunction:
    return run


register(operation="attention_pair_bias", name="torch", supports=serves_everything, load=load)
