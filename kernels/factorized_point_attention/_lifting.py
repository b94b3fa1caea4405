"""Logits and values as inner products: what a query and a key hold, written side by side in one vector each.

-w/2 |qp - kp|^2 is w qp.kp - w/2 |kp|^2, up to what is constant over the keys and the softmax removes. The two terms
are large and cancel, the more so the further points are from the origin: 16 bits lose everything to that on an extended
chain. So points are taken from the centroid of the residues that are there, each as the sum of two 16-bit numbers, and
the keys' squared norms, summed over points, as the sum of three.
"""

from math import sqrt
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..dtypes import widest

#: A logit that no key can win with. Finite, so that an item without keys stays finite until it is set to zero.
NEVER = -1e30
#: The same in float16, which reaches 65,504.
NEVER_FLOAT16 = -6e4
#: float16 holds squared norms as so many parts of them; a power of two, so that nothing is lost.
PARTS_FLOAT16 = 256.0

Factors = tuple[Tensor, Tensor]


class Lifted(NamedTuple):
    """Queries and keys [b, n, h, d], values [b, n, h, dv], and what the value points were taken from."""

    q: Tensor
    k: Tensor
    v: Tensor
    centre: Tensor | None


def query_width(c: int, p: int, r: int, *, precise: bool, narrow: bool) -> int:
    """Columns of a lifted query or key.

    Args:
        c: Channels.
        p: Query points.
        r: The rank of the bias; 0 for no bias.
        precise: Which lifting.
        narrow: Whether columns have 16 bits.
    """
    if not precise:
        return c + 5 * p + r
    return c + (12 * p + 3 if narrow else 3 * p + 1) + r


def value_width(c: int, pv: int, r: int, cp: int) -> int:
    """Columns of a lifted value; `r` is the rank of the pair values, of width `cp`."""
    return c + 3 * pv + r * cp


def lift(
    q: Float[Tensor, "b n h c"],
    k: Float[Tensor, "b n h c"],
    v: Float[Tensor, "b n h c"],
    q_points: Float[Tensor, "b n h p 3"],
    k_points: Float[Tensor, "b n h p 3"],
    v_points: Float[Tensor, "b n h pv 3"],
    point_weights: Float[Tensor, " h"],
    bias_factors: Factors | None,
    pair_factors: Factors | None,
    mask: Bool[Tensor, "b n"] | None,
    precise: bool,
    inner: torch.dtype,
) -> Lifted:
    """Write queries, keys and values so that attention with a scale of 1 is all that is left, in the type `inner`.

    A masked residue holds zeros, but for the column that keeps it from being a key: it may hold anything before.
    """
    wide = widest(q, q_points, torch.empty((), dtype=inner))
    gone = None if mask is None else ~mask[:, :, None, None]
    c, p = q.shape[-1], q_points.shape[-2]
    q, k, v = (_there(x.to(wide), gone) for x in (q, k, v))
    centre = centroid(k_points, mask).to(wide) if precise else None
    k = k * sqrt(1 / (3 * c))
    weight = sqrt(2 / (27 * p)) * point_weights.to(wide)[:, None]
    q_points, k_points, v_points = (
        _there((x.to(wide) if centre is None else x.to(wide) - centre).flatten(-2), gone)
        for x in (q_points, k_points, v_points)
    )
    if not precise:
        of_q, of_k = _plain(q_points, k_points, weight, gone, inner)
    elif inner.itemsize == 2:
        of_q, of_k = _in_parts(q_points, k_points, weight, gone, inner)
    else:
        norm = -0.5 * weight * k_points.square().sum(-1, keepdim=True)
        of_q, of_k = [q_points * weight, torch.ones_like(norm)], [k_points, _out_of_reach(norm, gone, inner)]
    b1, b2 = ([_there(x.to(wide), gone)] for x in bias_factors) if bias_factors is not None else ([], [])
    values = [v, v_points]
    if pair_factors is not None:
        z2 = pair_factors[1].to(wide).flatten(-2)[:, :, None].expand(-1, -1, v.shape[2], -1)
        values.append(_there(z2, gone))
    return Lifted(
        torch.cat([x.to(inner) for x in (q, *of_q, *b1)], -1),
        torch.cat([x.to(inner) for x in (k, *of_k, *b2)], -1),
        torch.cat([x.to(inner) for x in values], -1),
        centre,
    )


def _plain(
    q_points: Tensor, k_points: Tensor, weight: Tensor, gone: Tensor | None, inner: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """FlashIPA's columns: points, then the squared norm of each, the query's too, each rounded once."""
    q_norms, k_norms = (x.unflatten(-1, (-1, 3)).square().sum(-1) for x in (q_points, k_points))
    key = -0.5 * weight * k_norms
    constant = (-0.5 * weight).expand_as(key)
    return [q_points, q_norms, torch.ones_like(key)], [k_points * weight, constant, _out_of_reach(key, gone, inner)]


def _in_parts(
    q_points: Tensor, k_points: Tensor, weight: Tensor, gone: Tensor | None, inner: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """q.k as (q1 + q2).(k1 + k2), and the keys' norms, as the parts give them, in three.

    q2.k2 is small, but not to the softmax: without it, rows of an extended chain of 390 nm are wrong by 0.02.
    """
    q1, q2 = _parts(q_points * weight, inner, 2)
    k1, k2 = _parts(k_points, inner, 2)
    # Of the points as their parts have them: the norm and the product must err alike, or they do not cancel.
    held = k1.to(weight.dtype) + k2.to(weight.dtype)
    scale = PARTS_FLOAT16 if inner is torch.float16 else 1.0
    norm = _out_of_reach((-0.5 / scale) * weight * held.square().sum(-1, keepdim=True), gone, inner)
    ones = torch.full_like(norm, scale).expand(*norm.shape[:-1], 3)
    return [q1, q1, q2, q2, ones], [k1, k2, k1, k2, *_parts(norm, inner, 3)]


def _parts(x: Tensor, inner: torch.dtype, count: int) -> list[Tensor]:
    """Numbers of the type `inner` whose sum is x, but for the last one's rounding. The gradient goes to the first."""
    first = x.to(inner)
    parts, rest = [first], x.detach() - first.detach().to(x.dtype)
    for _ in range(count - 1):
        parts.append(rest.to(inner))
        rest = rest - parts[-1].to(x.dtype)
    return parts


def _there(x: Tensor, gone: Bool[Tensor, "b n 1 1"] | None) -> Tensor:
    return x if gone is None else x.masked_fill(gone, 0.0)


def _out_of_reach(norm: Tensor, gone: Bool[Tensor, "b n 1 1"] | None, inner: torch.dtype) -> Tensor:
    return norm if gone is None else norm.masked_fill(gone, NEVER_FLOAT16 if inner is torch.float16 else NEVER)


def centroid(k_points: Float[Tensor, "b n h p 3"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b 1 1 1 3"]:
    """Of all key points of the residues that are there. It moves nothing, so it needs no gradient."""
    points = k_points.detach()
    if mask is None:
        return points.mean((1, 2, 3), keepdim=True)
    points = points.mean((2, 3), keepdim=True).masked_fill(~mask[:, :, None, None, None], 0.0)
    return points.sum(1, keepdim=True) / mask.sum(1).clamp(min=1).to(points.dtype)[:, None, None, None, None]


def split_values(
    out: Float[Tensor, "b n h dv"],
    centre: Float[Tensor, "b 1 1 1 3"] | None,
    v: Float[Tensor, "b n h c"],
    v_points: Float[Tensor, "b n h pv 3"],
    pair_factors: Factors | None,
    mask: Bool[Tensor, "b n"] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take attended values apart: scalars, points (put back where they came from), pair values.

    A query that is masked gets zeros here, whatever it holds.
    """
    gone = None if mask is None else ~mask[:, :, None, None]
    out = _there(out, gone)
    scalars, points, rest = out.split(
        [v.shape[-1], 3 * v_points.shape[-2], out.shape[-1] - v.shape[-1] - 3 * v_points.shape[-2]], -1
    )
    points = points.to(v_points.dtype).unflatten(-1, (-1, 3))
    if centre is not None:
        points = points + (centre if gone is None else centre.masked_fill(gone[..., None], 0.0)).to(points.dtype)
    pair = None
    if pair_factors is not None:
        z1 = pair_factors[0] if gone is None else pair_factors[0].masked_fill(gone, 0.0)
        pair = times_query_factor(rest, z1)
    return scalars.to(v.dtype), points.clone() if centre is None else points, pair


def times_query_factor(
    attended: Float[Tensor, "b n h rcp"], z1: Float[Tensor, "b n r cp"]
) -> Float[Tensor, "b n h cp"]:
    """The pair values, from what was attended of the keys' factors; in the type of z1."""
    dtype = widest(attended, z1)
    parts = attended.to(dtype).unflatten(-1, (z1.shape[-2], -1))
    return torch.einsum("bnhrz,bnrz->bnhz", parts, z1.to(dtype)).to(z1.dtype)
