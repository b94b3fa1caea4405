"""What trifast 0.1.13 does, in plain PyTorch."""

import math

import torch
from torch import Tensor


def triangle_attention(q: Tensor, k: Tensor, v: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """q, k, v [b, h, n, n, d], b [b, h, n, n], mask [b, n, n]: True is left out; the scale is d**-0.5 whatever happens.

    A row that is left out altogether is divided by n rounded up to a power of two.
    """
    items, heads, n, _, d = q.shape
    assert q.shape == k.shape == v.shape == (items, heads, n, n, d)
    assert b.shape == (items, heads, n, n) and mask.shape == (items, n, n) and mask.dtype is torch.bool
    assert d >= 16 and d & (d - 1) == 0, d
    logits = (q.float() @ k.float().transpose(-1, -2)) * d**-0.5 + b.float()[:, :, None]
    gone = mask[:, None, :, None, :]
    weights = logits.masked_fill(gone, torch.finfo(torch.float32).min).softmax(-1)
    padded = 2 ** math.ceil(math.log2(n))
    weights = torch.where(gone.all(-1, keepdim=True), 1.0 / padded, weights)
    return (weights @ v.float()).to(q.dtype)
