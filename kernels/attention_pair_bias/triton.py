"""Attention with a pair bias in Triton: no logit reaches memory, and the bias's gradient needs no atomics."""

from jaxtyping import Bool, Float
from torch import Tensor

from ..biased_attention._tiles import reasons_against
from ..common.pair_projection import PairProjection, project
from ..registry import register
from ..registry.types import KernelFunction


def run(
    q: Float[Tensor, "s n h d"],
    k: Float[Tensor, "s m h d"],
    v: Float[Tensor, "s m h d"],
    pairs: Float[Tensor, "b h n m"] | Float[Tensor, "b n m cz"],
    mask: Bool[Tensor, "s m"] | None = None,
    projection: PairProjection | None = None,
) -> Float[Tensor, "s n h d"]:
    """Project the bias, then attend: the sequences that share a bias are its rows."""
    from ._launch import attention_pair_bias_triton

    bias = project(pairs, projection)
    b = bias.shape[0]
    # [s, n, h, d] to [b, h, s / b, n, d]
    q, k, v = (x.unflatten(0, (b, -1)).permute(0, 3, 1, 2, 4) for x in (q, k, v))
    out: Tensor = attention_pair_bias_triton(q, k, v, bias, None if mask is None else mask.unflatten(0, (b, -1)))[0]
    return out.permute(0, 2, 3, 1, 4).flatten(0, 1)


def load() -> KernelFunction:
    from . import _launch  # noqa: F401 - here, so that a Triton that cannot be imported is found while choosing

    return run


register(
    operation="attention_pair_bias",
    name="triton",
    needs=("triton>=3.6",),
    supports=reasons_against,
    load=load,
)
