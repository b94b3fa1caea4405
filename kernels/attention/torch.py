"""Padded self-attention through PyTorch's scaled_dot_product_attention; with dropout, by two products of our own."""

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ..registry import register
from ..requests import KernelFunction, serves_everything
from ._dropped import attention_dropped


def run(
    q: Float[Tensor, "b n h d"],
    k: Float[Tensor, "b n h d"],
    v: Float[Tensor, "b n h d"],
    mask: Bool[Tensor, "b n"] | None = None,
    keep: Bool[Tensor, "b h n n"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "b n h d"]:
    """Attend, and give zeros to the tokens that are not there."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if keep is None:
        allowed = None if mask is None else mask[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    else:
        # SDPA would draw its own mask, and on a CPU it keeps several n x n tensors for the backward.
        out = attention_dropped(q, k, v, mask, keep, dropout)
    out = out.transpose(1, 2)
    return out if mask is None else out.masked_fill(~mask[:, :, None, None], 0.0)


def load() -> KernelFunction:
    return run


register(operation="attention", name="torch", supports=serves_everything, load=load)
