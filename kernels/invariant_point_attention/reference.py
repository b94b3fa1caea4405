"""Invariant point attention, as AlphaFold 2 defines it: the function that every other kernel must compute.

Jumper et al. 2021, Supplementary Algorithm 22, lines 7 to 11. Written to be read, and run in float64 as the truth.
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
    z: Float[Tensor, "b n n cz"],
    bias_weight: Float[Tensor, "h cz"],
    mask: Bool[Tensor, "b n"],
    pair_mask: Bool[Tensor, "b n n"] | None = None,
    logit_bias: Float[Tensor, " h"] | None = None,
    keep: Float[Tensor, "b h n n"] | None = None,
) -> tuple[Float[Tensor, "b n h c"], Float[Tensor, "b n h pv 3"], Float[Tensor, "b n h cz"]]:
    """Attend over residues by scalars, by distances between points, and by the pair representation."""
    given, c, p = q.dtype, q.shape[-1], q_points.shape[-2]
    dtype = widest(q, q_points, z)
    q, k, v, z, bias_weight = (x.to(dtype) for x in (q, k, v, z, bias_weight))

    scalar = torch.einsum("bihc,bjhc->bhij", q, k) / sqrt(c)
    pair = torch.einsum("bijz,hz->bhij", z, bias_weight)
    if logit_bias is not None:
        pair = pair + logit_bias.to(dtype)[:, None, None]
    distance = (q_points[:, :, None] - k_points[:, None]).square().sum((-1, -2)).permute(0, 3, 1, 2)
    # The three terms enter with equal variance at initialisation: w_L = sqrt(1/3), w_C = sqrt(2 / 9P).
    logits = sqrt(1 / 3) * (scalar + pair) - 0.5 * sqrt(2 / (27 * p)) * point_weights[:, None, None] * distance
    if keep is not None:
        logits = logits * keep

    allowed = mask[:, None, :, None] & mask[:, None, None, :]
    if pair_mask is not None:
        allowed = allowed & pair_mask[:, None]
    # A row without keys would be 0 / 0: its logits and its weights are set to zero, so no NaN is differentiated.
    empty = ~allowed.any(-1, keepdim=True)
    attention = logits.masked_fill(~allowed & ~empty, -torch.inf).masked_fill(empty, 0.0).softmax(-1)
    attention = attention.masked_fill(empty, 0.0)
    return (
        torch.einsum("bhij,bjhc->bihc", attention, v).to(given),
        torch.einsum("bhij,bjhpx->bihpx", attention, v_points.to(dtype)).to(v_points.dtype),
        torch.einsum("bhij,bijz->bihz", attention, z).to(given),
    )


def load() -> KernelFunction:
    return run


register(
    operation="invariant_point_attention",
    name="reference",
    supports=serves_everything,
    load=load,
    transforms=ALL_TRANSFORMS,
)
