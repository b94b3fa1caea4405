"""Attention with a pair bias, written out: the function that every other kernel must compute."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ..dtypes import widest
from ..registry import register
from ..registry.types import ALL_TRANSFORMS, KernelFunction, serves_everything
from . import PairProjection


def run(
    q: Float[Tensor, "s n h d"],
    k: Float[Tensor, "s m h d"],
    v: Float[Tensor, "s m h d"],
    pairs: Float[Tensor, "b h n m"] | Float[Tensor, "b n m cz"],
    mask: Bool[Tensor, "s m"] | None = None,
    projection: PairProjection | None = None,
) -> Float[Tensor, "s n h d"]:
    """Scaled dot products plus the bias, softmax over the keys that are there, weighted mean of the values."""
    given, dtype = q.dtype, widest(q)
    q, k, v, bias = q.to(dtype), k.to(dtype), v.to(dtype), pairs.to(dtype)
    if projection is not None:
        scale, shift = (None if w is None else w.to(dtype) for w in (projection.norm_weight, projection.norm_bias))
        if scale is not None:
            bias = F.layer_norm(bias, bias.shape[-1:], scale, shift, projection.eps)
        bias = torch.einsum("bijz,hz->bhij", bias, projection.weight.to(dtype))
    bias = bias.repeat_interleave(q.shape[0] // bias.shape[0], 0)
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5 + bias
    if mask is None:
        weights = logits.softmax(-1)
    else:
        keys = mask[:, None, None, :]
        empty = ~keys.any(-1, keepdim=True)
        weights = logits.masked_fill(~keys & ~empty, -torch.inf).softmax(-1).masked_fill(empty, 0.0)
    return torch.einsum("bhij,bjhd->bihd", weights, v).to(given)


def load() -> KernelFunction:
    return run


register(
    operation="attention_pair_bias", name="reference", supports=serves_everything, load=load, transforms=ALL_TRANSFORMS
)
