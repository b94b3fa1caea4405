"""Factorised point attention by PyTorch's scaled_dot_product_attention, on lifted queries, keys and values.

Memory is linear in length: nothing is held for a pair of residues.
"""

import torch as pytorch  # `torch` is this kernel
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ..registry import register
from ..requests import KernelFunction, serves_everything
from ._lifting import lift, split_values


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
    inner: pytorch.dtype,
) -> tuple[Float[Tensor, "b n h c"], Float[Tensor, "b n h pv 3"], Float[Tensor, "b n h cp"] | None]:
    """Lift, attend, and take the values apart again."""
    lifted = lift(
        q, k, v, q_points, k_points, v_points, point_weights, bias_factors, pair_factors, mask, precise, inner
    )
    width = max(lifted.q.shape[-1], lifted.v.shape[-1])
    wide_q, wide_k, wide_v = (
        F.pad(x, (0, width - x.shape[-1])).transpose(1, 2) for x in (lifted.q, lifted.k, lifted.v)
    )
    out = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, scale=1.0).transpose(1, 2)
    out = out[..., : lifted.v.shape[-1]]
    return split_values(out, lifted.centre, v, v_points, pair_factors, mask)


def load() -> KernelFunction:
    return run


register(operation="factorized_point_attention", name="torch", supports=serves_everything, load=load)
