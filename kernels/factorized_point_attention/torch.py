"""Factorised point attention in PyTorch's own operators, in memory that is linear in length.

On CUDA scaled_dot_product_attention takes lifted queries, keys and values. In 16 bits it gives the attended points in
16 bits, too, counted from the centroid: to 1 part in 512.

Elsewhere blocks of query rows are streamed, in the points' type, whatever the rest may be rounded to: 16-bit products
gain nothing on most processors, and points would lose. Values have a width of their own: on a CPU, PyTorch's fused
attention wants them as wide as keys, or else holds all pairs. It serves only where FlashIPA's rounding is asked for.
"""

from math import sqrt

import torch as pytorch  # `torch` is this kernel
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ..common.determinism import reasons_against_unordered_sums
from ..common.double_backward import fused_by_pytorch
from ..common.matmul import dot_product_attention
from ..registry import register
from ..registry.types import KernelFunction, Reason, Request
from ._lifting import centroid, lift, split_values, times_query_factor
from ._streamed import factorized_streamed

#: The widest head of PyTorch's flash attention, which queries, keys and values share.
_FLASH_WIDTH = 256
#: What the other fused attention wants widths to be a multiple of.
_ALIGNMENT = 8


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
    narrow = inner.itemsize == 2
    if not (narrow and not precise) and (q.device.type != "cuda" or inner is pytorch.float64):
        return _streamed(
            q, k, v, q_points, k_points, v_points, point_weights, bias_factors, pair_factors, mask, precise
        )
    lifted = lift(
        q, k, v, q_points, k_points, v_points, point_weights, bias_factors, pair_factors, mask, precise, inner
    )
    out = _attend(lifted.q.transpose(1, 2), lifted.k.transpose(1, 2), lifted.v.transpose(1, 2)).transpose(1, 2)
    return split_values(out, lifted.centre, v, v_points, pair_factors, mask)


def _attend(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n dv"]
) -> Float[Tensor, "b h n dv"]:
    """PyTorch's fused attention: all as wide where flash attention takes that, else each as wide as it is."""
    width = max(q.shape[-1], v.shape[-1])
    if q.device.type == "cpu" or (q.dtype.itemsize == 2 and width <= _FLASH_WIDTH):
        of_keys = of_values = width
    else:
        of_keys, of_values = q.shape[-1], v.shape[-1]
    wide_q, wide_k = (_pad(x, of_keys) for x in (q, k))
    out = dot_product_attention(wide_q, wide_k, _pad(v, of_values), scale=1.0)
    out = fused_by_pytorch(out, operation="factorized_point_attention", kernel="torch")
    return out[..., : v.shape[-1]]


def _pad(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, -(-width // _ALIGNMENT) * _ALIGNMENT - x.shape[-1]))


def _streamed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_points: Tensor,
    k_points: Tensor,
    v_points: Tensor,
    point_weights: Tensor,
    bias_factors: tuple[Tensor, Tensor] | None,
    pair_factors: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    precise: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Block by block; in the points' type, whatever the rest is held in."""
    b, n, h, _ = q.shape
    centre = centroid(k_points, mask) if precise else k_points.new_zeros(b, 1, 1, 1, 3)
    b1, b2 = bias_factors or (q.new_empty(b, n, h, 0),) * 2
    z2 = pair_factors[1].flatten(-2) if pair_factors else q.new_empty(b, n, 0)
    weights = sqrt(2 / (27 * q_points.shape[-2])) * point_weights
    points = (x.flatten(-2) for x in (q_points, k_points, v_points))
    out, attended, pairs = factorized_streamed(q, k, v, *points, weights, b1, b2, z2, centre.view(b, 3), mask)
    there = 1.0 if mask is None else mask[:, :, None, None, None].to(centre.dtype)
    pair = None
    if pair_factors is not None:
        pair = times_query_factor(pairs, pair_factors[0])
    return out, attended.unflatten(-1, (-1, 3)) + centre * there, pair


def supports(request: Request) -> list[Reason]:
    """Refuse deterministic training on a GPU."""
    return reasons_against_unordered_sums(request, "the backward pass of scaled_dot_product_attention")


def load() -> KernelFunction:
    return run


register(operation="factorized_point_attention", name="torch", supports=supports, load=load)
