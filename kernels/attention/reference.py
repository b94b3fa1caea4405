"""Self-attention over a padded sequence, written out: the function that every other kernel must compute."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..dtypes import widest
from ..registry import register
from ..registry.types import ALL_TRANSFORMS, KernelFunction, serves_everything


def run(
    q: Float[Tensor, "b n h d"],
    k: Float[Tensor, "b n h d"],
    v: Float[Tensor, "b n h d"] | None,
    mask: Bool[Tensor, "b n"] | None = None,
    keep: Bool[Tensor, "b h n n"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "b n h d"]:
    """Scaled dot products, softmax over the tokens that are there, weighted mean of the values.

    Without values, the weights [b, h, i, j] are given, as `attention_maps` asks: of any queries, none of them masked.
    """
    given, dtype = q.dtype, widest(q)
    q, k = q.to(dtype), k.to(dtype)
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    if mask is None:
        weights = logits.softmax(-1)
    elif v is None:
        weights = logits.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1).nan_to_num()
    else:
        empty = ~mask[:, None, :, None]  # a query that is there has at least itself as a key
        weights = logits.masked_fill(~mask[:, None, None, :] & ~empty, -torch.inf).softmax(-1).masked_fill(empty, 0.0)
    if keep is not None:
        weights = weights * keep / (1.0 - dropout)
    return weights if v is None else torch.einsum("bhij,bjhd->bihd", weights, v.to(dtype)).to(given)


def load() -> KernelFunction:
    return run


register(operation="attention", name="reference", supports=serves_everything, load=load, transforms=ALL_TRANSFORMS)
