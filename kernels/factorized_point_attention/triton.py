"""Factorised point attention in Triton: scalars in 16 bits where they are given so, points and norms always in float32.

Queries, keys and values have widths of their own, and channels no limit. Padding behind an item's last residue costs
nothing.
"""

from math import sqrt

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..registry import register
from ..registry.types import KernelFunction
from ._lifting import NEVER, centroid, times_query_factor
from ._tiles import reasons_against


def run(
    q: Float[Tensor, "b n h c"],
    k: Float[Tensor, "b n h c"],
    v: Float[Tensor, "b n h c"],
    q_points: Float[Tensor, "b n h p 3"],
    k_points: Float[Tensor, "b n h p 3"],
    v_points: Float[Tensor, "b n h pv 3"],
    point_weights: Float[Tensor, " h"],
    bias_factors: tuple[Float[Tensor, "b n h r"], Float[Tensor, "b n h r"]] | None,
    pair_factors: tuple[Float[Tensor, "b n r cp"], Float[Tensor, "b n r cp"]] | None,
    mask: Bool[Tensor, "b n"] | None,
    precise: bool,
    inner: torch.dtype,
) -> tuple[Float[Tensor, "b n h c"], Float[Tensor, "b n h pv 3"], Float[Tensor, "b n h cp"] | None]:
    """Prepare what each residue holds by itself, attend, and put the points back."""
    from ._launch import factorized_point_attention_triton

    assert precise
    given, h, c = q.dtype, q.shape[2], q.shape[3]
    gone = None if mask is None else ~mask[:, :, None, None]

    def there(x: Tensor) -> Tensor:
        # A masked residue may hold anything, and 0 times that may be NaN.
        return x if gone is None else x.masked_fill(gone, 0.0)

    centre = centroid(k_points, mask)
    weight = sqrt(2 / (27 * q_points.shape[-2])) * point_weights[:, None]
    qf, kf, vf = (there((x - centre).flatten(-2)) for x in (q_points, k_points, v_points))
    kb = -0.5 * weight[:, 0] * kf.square().sum(-1)
    if gone is not None:
        kb = kb.masked_fill(gone[..., 0], NEVER)
    qf = qf * weight
    if bias_factors is not None:
        qf, kf = (torch.cat([x, there(y.to(x.dtype))], -1) for x, y in zip((qf, kf), bias_factors, strict=True))
    if pair_factors is not None:
        v = torch.cat([v, pair_factors[1].flatten(-2)[:, :, None].expand(-1, -1, h, -1)], -1)
    out, points, _ = factorized_point_attention_triton(
        *(there(x.to(inner)) for x in (q, k, v)), qf, kf, kb.transpose(1, 2), vf, _ends(mask, q)
    )
    out, points = there(out), there(points).unflatten(-1, (-1, 3))
    points = points + (centre if gone is None else centre.masked_fill(gone[..., None], 0.0))
    pair = None
    if pair_factors is not None:
        pair = times_query_factor(out[..., c:], pair_factors[0])
    return out[..., :c].to(given), points, pair


def _ends(mask: Bool[Tensor, "b n"] | None, like: Tensor) -> Tensor:
    """Behind each item's last residue. It stays on the device, so that nothing waits."""
    b, n = like.shape[:2]
    if mask is None:
        return torch.full((b,), n, dtype=torch.int32, device=like.device)
    return (mask * torch.arange(1, n + 1, device=like.device)).amax(1).to(torch.int32)


def load() -> KernelFunction:
    from . import _launch  # noqa: F401 - here, so that a Triton that cannot be imported is found while choosing

    return run


register(
    operation="factorized_point_attention",
    name="triton",
    needs=("triton>=3.6",),
    supports=reasons_against,
    load=load,
)
