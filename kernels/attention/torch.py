"""Padded self-attention through PyTorch's scaled_dot_product_attention; with dropout, by two products of our own."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..common.determinism import reasons_against_unordered_sums
from ..common.double_backward import fused_by_pytorch
from ..common.matmul import dot_product_attention
from ..dtypes import any_requires_grad, widest
from ..registry import register
from ..registry.types import KernelFunction, Reason, Request
from ._dropped import attention_dropped

#: Weights in one piece up to this many, on a CPU; larger ones head by head, so that what stands beside them is small.
_MAPS_AT_ONCE = 1 << 20


def run(
    q: Float[Tensor, "b n h d"],
    k: Float[Tensor, "b n h d"],
    v: Float[Tensor, "b n h d"] | None,
    mask: Bool[Tensor, "b n"] | None = None,
    keep: Bool[Tensor, "b h n n"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "b n h d"]:
    """Attend, and give zeros to the tokens that are not there. Without values, give the weights."""
    if v is None:
        return _maps(q, k, mask)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if keep is None:
        allowed = None if mask is None else mask[:, None, None, :]
        out = fused_by_pytorch(dot_product_attention(q, k, v, allowed), operation="attention", kernel="torch")
    else:
        # SDPA would draw its own mask, and on a CPU it keeps several n x n tensors for the backward.
        out = attention_dropped(q, k, v, mask, keep, dropout)
    out = out.transpose(1, 2)
    return out if mask is None else out.masked_fill(~mask[:, :, None, None], 0.0)


def _maps(
    q: Float[Tensor, "b i h d"], k: Float[Tensor, "b j h d"], mask: Bool[Tensor, "b j"] | None
) -> Float[Tensor, "b h i j"]:
    """The weights, in float32 at least; zero in an item without keys."""
    dtype = widest(q)
    queries = (q.to(dtype) * q.shape[-1] ** -0.5).transpose(1, 2)
    keys = k.to(dtype).permute(0, 2, 3, 1)
    b, h, i, _ = queries.shape
    j = keys.shape[-1]
    whole = b * h * i * j <= _MAPS_AT_ONCE or q.device.type != "cpu"
    if whole or torch.compiler.is_compiling() or any_requires_grad(q, k):
        logits = queries @ keys
        if mask is None:
            return logits.softmax(-1)
        # Finite: an item without keys then has an even row, which is set to zero.
        gone = ~mask[:, None, None]
        return logits.masked_fill(gone, -1e30).softmax(-1).masked_fill(gone, 0.0)
    maps, logits = q.new_empty(b, h, i, j, dtype=dtype), q.new_empty(i, j, dtype=dtype)
    for item in range(b):
        gone_here = None if mask is None or bool(mask[item].all()) else ~mask[item]
        for head in range(h):
            torch.mm(queries[item, head], keys[item, head], out=logits)
            if gone_here is not None:
                logits.masked_fill_(gone_here, -1e30)
            torch.softmax(logits, -1, out=maps[item, head])
            if gone_here is not None:
                maps[item, head].masked_fill_(gone_here, 0.0)
    return maps


def supports(request: Request) -> list[Reason]:
    """Refuse deterministic training on a GPU."""
    return reasons_against_unordered_sums(request, "the backward pass of scaled_dot_product_attention")


def load() -> KernelFunction:
    return run


register(operation="attention", name="torch", supports=supports, load=load, transforms=frozenset({"func"}))
