"""Invariant point attention in Triton: exact, z is loaded once forward and once backward, its gradient written once.

That holds for as many heads as a tile has, 16, or 8 where z is wider than 128; more are served in groups, one after the
other.
Queries and keys are lifted as for the kernel `torch`; beside a 16-bit z, each lifted number is the sum of two of 16
bits, so that the logits are as good as float32's.

On chips of capability 9.0 and more the forward pass beside a 16-bit z and up to 8 heads has a second way to read its
tiles, through tensor descriptors: 16 query rows a program, half the instructions. There points are the sum of two
numbers and scalars are rounded to float16. `foldkernels tune` tries it; unmeasured it is not taken. A z that no
descriptor holds (expanded, transposed, or its rows not aligned to 16 bytes) is read by pointers.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..registry import register
from ..registry.types import KernelFunction
from ._rows import lift
from ._tiles import heads_at_once, reasons_against
from .torch import split_values


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
    keep: None = None,
) -> tuple[Float[Tensor, "b n h c"], Float[Tensor, "b n h pv 3"], Float[Tensor, "b n h cz"]]:
    """Lift, attend, and take the values apart again."""
    from ._launch import ipa_triton

    lifted = lift(q, k, v, q_points, k_points, v_points, point_weights, mask)
    there = mask if pair_mask is None else mask & (pair_mask & mask[:, None]).any(-1)
    some = heads_at_once(z.shape[-1])
    by_head = (*(x.split(some, 1) for x in lifted[:3]), bias_weight.split(some))
    points = 3 * q_points.shape[-2]
    found = [ipa_triton(q, k, v, z, weight, there, pair_mask, points) for q, k, v, weight in zip(*by_head, strict=True)]
    out = torch.cat([group[0] for group in found], 1) if len(found) > 1 else found[0][0]
    pair = torch.cat([group[1] for group in found], 2) if len(found) > 1 else found[0][1]
    return (*split_values(out, lifted.centre, there, v, v_points), pair.to(q.dtype))


def load() -> KernelFunction:
    from . import _launch  # noqa: F401 - here, so that a Triton that cannot be imported is found while choosing

    return run


register(
    operation="invariant_point_attention",
    name="triton",
    needs=("triton>=3.6",),
    supports=reasons_against,
    load=load,
)
