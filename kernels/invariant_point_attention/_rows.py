"""Invariant point attention over one block of query rows: the pieces that the streamed kernels are made of.

Queries and keys are lifted: scalars, points and norms side by side, so that one inner product gives the scalar and the
point part of the logits. Everything that is constant over the keys is left out, because the softmax removes it.
"""

from math import sqrt
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..tensors import widest

#: A logit that no key can win with. Finite, so that a row without any keys stays finite until it is set to zero.
NEVER = -1e30


class Lifted(NamedTuple):
    """Queries, keys and values of all heads: [b, h, n, c + 3p + 1] twice, and [b, h, n, c + 3pv]."""

    q: Tensor
    k: Tensor
    v: Tensor
    centre: Tensor


def lift(
    q: Float[Tensor, "b n h c"],
    k: Float[Tensor, "b n h c"],
    v: Float[Tensor, "b n h c"],
    q_points: Float[Tensor, "b n h p 3"],
    k_points: Float[Tensor, "b n h p 3"],
    v_points: Float[Tensor, "b n h pv 3"],
    point_weights: Float[Tensor, " h"],
    mask: Bool[Tensor, "b n"],
) -> Lifted:
    """Write logits as inner products: -w/2 |qp - kp|^2 is w qp.kp - w/2 |kp|^2, up to what the softmax removes.

    Points are taken from the centre of the residues that are there: the two terms are large and cancel, the more so the
    further the protein is from the origin.
    """
    dtype = widest(q, q_points)
    c, p = q.shape[-1], q_points.shape[-2]
    there = mask[:, :, None, None, None].to(dtype)
    count = there.sum(1, keepdim=True).clamp(min=1.0)
    centre = ((k_points.to(dtype) * there).sum(1, keepdim=True) / count).mean((2, 3), keepdim=True).detach()
    q_points, k_points, v_points = (x.to(dtype) - centre for x in (q_points, k_points, v_points))
    weight = sqrt(2 / (27 * p)) * point_weights.to(dtype)[:, None]
    norm = -0.5 * weight * k_points.square().sum((-1, -2))[..., None]
    lifted_q = torch.cat(
        [q.to(dtype) * sqrt(1 / (3 * c)), (weight[..., None] * q_points).flatten(-2), torch.ones_like(norm)], dim=-1
    )
    lifted_k = torch.cat(
        [k.to(dtype), k_points.flatten(-2), norm.masked_fill(~mask[:, :, None, None], NEVER)], dim=-1
    )
    lifted_v = torch.cat([v.to(dtype), v_points.flatten(-2)], dim=-1)
    return Lifted(*(x.transpose(1, 2).contiguous() for x in (lifted_q, lifted_k, lifted_v)), centre)


def attention_rows(
    q: Float[Tensor, "h rows d"],
    k_transposed: Float[Tensor, "h d n"],
    z: Float[Tensor, "rows n cz"],
    bias_weight: Float[Tensor, "cz h"],
    pair_mask: Bool[Tensor, "rows n"] | None,
) -> Float[Tensor, "h rows n"]:
    """The attention weights of a block. `bias_weight` is transposed, scaled by sqrt(1/3), and of z's type."""
    rows, n, _ = z.shape
    logits = torch.bmm(q, k_transposed)
    logits += torch.mm(z.reshape(rows * n, -1), bias_weight).view(rows, n, -1).permute(2, 0, 1)
    if pair_mask is not None:
        logits.masked_fill_(~pair_mask, NEVER)
    return torch.softmax(logits, -1, out=logits)


def forward_rows(
    attention: Float[Tensor, "h rows n"],
    v: Float[Tensor, "h n dv"],
    z: Float[Tensor, "rows n cz"],
    there: Bool[Tensor, " rows"],
    out: Float[Tensor, "h rows dv"],
    pair: Float[Tensor, "rows h cz"],
) -> None:
    """Average the values and the pair representation over the keys, into `out` and `pair`."""
    out.copy_(torch.bmm(attention, v))
    pair.copy_(torch.bmm(attention.transpose(0, 1).to(z.dtype), z))
    gone = ~there
    out.masked_fill_(gone[None, :, None], 0.0)
    pair.masked_fill_(gone[:, None, None], 0.0)


def backward_rows(
    attention: Float[Tensor, "h rows n"],
    d_out: Float[Tensor, "h rows dv"],
    d_pair: Float[Tensor, "rows h cz"],
    v_transposed: Float[Tensor, "h dv n"],
    z: Float[Tensor, "rows n cz"],
) -> Float[Tensor, "h rows n"]:
    """The gradient of the logits: dL = a (dA - sum_j a dA), where dA collects what values and pair values ask for."""
    d_attention = torch.bmm(d_out, v_transposed)
    d_attention += torch.bmm(d_pair.to(z.dtype), z.transpose(1, 2)).transpose(0, 1)
    d_attention -= (d_attention * attention).sum(-1, keepdim=True)
    return d_attention.mul_(attention)


def backward_pair_rows(
    attention: Float[Tensor, "h rows n"],
    d_logits: Float[Tensor, "h rows n"],
    d_pair: Float[Tensor, "rows h cz"],
    bias_weight: Float[Tensor, "h cz"],
    dtype: torch.dtype,
) -> Float[Tensor, "rows n cz"]:
    """The gradient of a block of z: the logits' and the pair values' share in one product, [dL | a] @ [W_b ; dO]."""
    rows = attention.shape[1]
    left = torch.cat([d_logits, attention]).permute(1, 2, 0)
    right = torch.cat([bias_weight.expand(rows, -1, -1), d_pair], dim=1)
    return torch.bmm(left.to(dtype), right.to(dtype))
