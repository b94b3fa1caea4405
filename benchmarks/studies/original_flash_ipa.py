"""FlashIPA's attention in its own order of operations, for a machine without flash-attn: lifted, softmax held whole.

Our own code, after Liu et al. 2025 (arXiv:2505.11580): queries, keys and values are lifted as there, each point's
squared norm in a column of its own, and attended in float32. On a GPU flash-attn keeps the weights out of memory; where
it does not run, a matrix product, a softmax and a matrix product are what is left. Nothing is padded here: flash-attn's
common width of queries and values is not asked for.
"""

from math import sqrt

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]


def lifted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_points: Tensor,
    k_points: Tensor,
    v_points: Tensor,
    point_weights: Tensor,
    bias_factors: Factors,
    pair_factors: Factors,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `factorized_point_attention` gives, without a mask.

    Args:
        q: Queries [b, n, h, c]; k and v alike.
        k: Keys.
        v: Values.
        q_points: Query points [b, n, h, p, 3], global; k_points and v_points alike.
        k_points: Key points.
        v_points: Value points.
        point_weights: [h], after the softplus.
        bias_factors: Two of [b, n, h, r].
        pair_factors: Two of [b, n, r, cp].

    Returns:
        Attended scalars [b, n, h, c], points [b, n, h, pv, 3] and pair values [b, n, h, cp].
    """
    heads, c, p = q.shape[2], q.shape[3], q_points.shape[3]
    weight = (point_weights * sqrt(1.0 / (3 * (p * 9.0 / 2)))).view(1, 1, -1, 1)
    q_norms, k_norms = (torch.norm(x, dim=-1) ** 2 for x in (q_points, k_points))
    of_q = [q, q_points.flatten(-2), q_norms, torch.ones_like(q_norms), bias_factors[0]]
    key_constant = torch.ones_like(k_norms) * -0.5 * weight
    of_k = [k * sqrt(1.0 / (3 * c)), k_points.flatten(-2) * weight, key_constant, k_norms * -0.5 * weight]
    of_k.append(bias_factors[1])
    z1, z2 = pair_factors
    of_v = [v, v_points.flatten(-2), z2.flatten(-2)[:, :, None].expand(-1, -1, heads, -1)]
    lifted_q, lifted_k, lifted_v = (torch.cat(x, dim=-1).transpose(1, 2) for x in (of_q, of_k, of_v))
    attended = (torch.softmax(lifted_q @ lifted_k.transpose(-1, -2), dim=-1) @ lifted_v).transpose(1, 2)
    out, points, pairs = attended.split([c, 3 * v_points.shape[3], z1.shape[2] * z1.shape[3]], dim=-1)
    pair = torch.einsum("bnrd,bnhrd->bnhd", z1, pairs.unflatten(-1, (z1.shape[2], -1)))
    return out, points.unflatten(-1, (-1, 3)), pair
