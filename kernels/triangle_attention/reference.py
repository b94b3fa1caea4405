"""Triangle attention, written out: the function that every other kernel must compute."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..dtypes import widest
from ..registry import register
from ..registry.types import ALL_TRANSFORMS, KernelFunction, serves_everything


def run(
    q: Float[Tensor, "b h n m d"],
    k: Float[Tensor, "b h n m d"],
    v: Float[Tensor, "b h n m d"],
    bias: Float[Tensor, "b h m m"],
    mask: Bool[Tensor, "b n m"] | None = None,
) -> Float[Tensor, "b h n m d"]:
    """Scaled dot products within a row, plus the bias; softmax over the row's keys; weighted mean of the values."""
    given, dtype = q.dtype, widest(q)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    logits = torch.einsum("bhnid,bhnjd->bhnij", q, k) * q.shape[-1] ** -0.5 + bias.to(dtype)[:, :, None]
    if mask is None:
        weights = logits.softmax(-1)
    else:
        keys = mask[:, None, :, None, :]
        empty = ~keys.any(-1, keepdim=True)
        weights = logits.masked_fill(~keys & ~empty, -torch.inf).softmax(-1).masked_fill(empty, 0.0)
    return torch.einsum("bhnij,bhnjd->bhnid", weights, v).to(given)


def load() -> KernelFunction:
    return run


register(
    operation="triangle_attention", name="reference", supports=serves_everything, load=load, transforms=ALL_TRANSFORMS
)
