"""What `cuequivariance_torch` 0.13 documents of its triangle functions, in plain PyTorch.

Shapes that the documentation does not allow are refused, so that a wrong layout fails loudly where sizes differ.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def triangle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    return_aux: bool = False,
    *,
    kv_lengths: Tensor | None = None,
) -> Tensor:
    """q [B, N, H, Q, D], k and v [B, N, H, K, D], bias [B, 1, H, Q, K], mask [B, N, 1, 1, K]: True is kept."""
    b, n, h, queries, d = q.shape
    keys = k.shape[3]
    assert k.shape == v.shape == (b, n, h, keys, d), (k.shape, v.shape)
    assert bias.shape == (b, 1, h, queries, keys), bias.shape
    assert kv_lengths is None and not return_aux
    scale = d**-0.5 if scale is None else scale
    logits = scale * (q.float() @ k.float().transpose(-1, -2)) + bias.float()
    if mask is not None:
        assert mask.shape == (b, n, 1, 1, keys), mask.shape
        logits = torch.where(mask.bool(), logits, -1e9)
    return (logits.softmax(-1) @ v.float()).to(q.dtype)


def triangle_multiplicative_update(
    x: Tensor,
    direction: str = "outgoing",
    mask: Tensor | None = None,
    norm_in_weight: Tensor | None = None,
    norm_in_bias: Tensor | None = None,
    p_in_weight: Tensor | None = None,
    p_in_bias: Tensor | None = None,
    g_in_weight: Tensor | None = None,
    g_in_bias: Tensor | None = None,
    norm_out_weight: Tensor | None = None,
    norm_out_bias: Tensor | None = None,
    p_out_weight: Tensor | None = None,
    p_out_bias: Tensor | None = None,
    g_out_weight: Tensor | None = None,
    g_out_bias: Tensor | None = None,
    eps: float = 1e-5,
    precision: object = None,
) -> Tensor:
    """x [B, N, N, C], mask [B, N, N]: 1 is kept; in the packed weights [2 D, C] the left factor comes first."""
    assert direction in ("outgoing", "incoming"), direction
    c = x.shape[-1]
    d = c if p_in_weight is None else p_in_weight.shape[0] // 2
    assert d % 32 == 0, d
    # A weight that is not given is drawn, anew in every call.
    p_in_weight, g_in_weight = (torch.randn(2 * d, c) if w is None else w for w in (p_in_weight, g_in_weight))
    p_out_weight, g_out_weight = (
        torch.randn(shape) if w is None else w for w, shape in ((p_out_weight, (c, d)), (g_out_weight, (c, c)))
    )
    assert p_in_weight.shape == g_in_weight.shape == (2 * d, c)
    assert p_out_weight.shape == (c, d) and g_out_weight.shape == (c, c)
    x = F.layer_norm(x, (c,), norm_in_weight, norm_in_bias, eps)
    edges = F.linear(x, p_in_weight, p_in_bias) * F.linear(x, g_in_weight, g_in_bias).sigmoid()
    if mask is not None:
        assert mask.shape == x.shape[:-1], mask.shape
        edges = edges * mask[..., None]
    left, right = edges[..., :d], edges[..., d:]
    if direction == "incoming":
        left, right = left.transpose(-2, -3), right.transpose(-2, -3)
    product = torch.einsum("...ikd,...jkd->...ijd", left, right)
    out = F.layer_norm(product, (d,), norm_out_weight, norm_out_bias, eps)
    return F.linear(out, p_out_weight, p_out_bias) * F.linear(x, g_out_weight, g_out_bias).sigmoid()
