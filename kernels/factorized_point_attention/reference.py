"""Factorised point attention, written out: the function that every other kernel must compute.

Liu et al. 2025 (FlashIPA), on Jumper et al. 2021, Supplementary Algorithm 22, lines 7 to 11. Written to be read, and
run in float64 as the truth.
"""

from math import sqrt

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..dtypes import widest
from ..registry import register
from ..registry.types import ALL_TRANSFORMS, KernelFunction, serves_everything


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
    """Attend over residues by scalars, by distances between points, and by a bias of low rank.

    `precise` and `inner` say how a kernel may round. The definition rounds nothing.
    """
    given, c, p = q.dtype, q.shape[-1], q_points.shape[-2]
    dtype = widest(q, q_points)

    scalar = torch.einsum("bihc,bjhc->bhij", q.to(dtype), k.to(dtype)) / sqrt(c)
    distance = (q_points[:, :, None] - k_points[:, None]).square().sum((-1, -2)).permute(0, 3, 1, 2)
    # w_L = sqrt(1/3) and w_C = sqrt(2 / 9P), as where three terms enter with equal variance; the bias has no factor.
    logits = sqrt(1 / 3) * scalar - 0.5 * sqrt(2 / (27 * p)) * point_weights[:, None, None] * distance
    if bias_factors is not None:
        logits = logits + torch.einsum("bihr,bjhr->bhij", *(x.to(dtype) for x in bias_factors))

    if mask is None:
        attention = logits.softmax(-1)
    else:
        # A query that is there has at least itself as a key; the others' rows stay finite until they are set to zero.
        gone = ~mask[:, None, :, None]
        attention = logits.masked_fill(~mask[:, None, None, :] & ~gone, -torch.inf).softmax(-1).masked_fill(gone, 0.0)
    pair = None
    if pair_factors is not None:
        z1, z2 = (x.to(dtype) for x in pair_factors)
        pair = torch.einsum("bihrz,birz->bihz", torch.einsum("bhij,bjrz->bihrz", attention, z2), z1).to(given)
    return (
        torch.einsum("bhij,bjhc->bihc", attention, v.to(dtype)).to(given),
        torch.einsum("bhij,bjhpx->bihpx", attention, v_points.to(dtype)).to(v_points.dtype),
        pair,
    )


def load() -> KernelFunction:
    return run


register(
    operation="factorized_point_attention",
    name="reference",
    supports=serves_everything,
    load=load,
    transforms=ALL_TRANSFORMS,
)
