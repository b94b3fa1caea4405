"""Invariant point attention in PyTorch's own operators: exact, lifted, streamed over blocks of query rows.

The points' squared distances become inner products, z is only ever read, and no tensor of size n x n x heads is held.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from ..registry import register
from ..registry.types import KernelFunction, Reason, Request
from ._rows import lift
from ._streamed import ipa_streamed


def supports(request: Request) -> list[Reason]:
    """Every reason against `request`."""
    if "logit_dropout" in request.options:
        # Dropped logits keep the terms that are constant over the keys, which lifting leaves out.
        return [Reason("it cannot drop logits", "use kernel 'reference', or set the IPA's dropout to 0")]
    return []


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
    """Lift, attend block by block, and take the values apart again."""
    lifted = lift(q, k, v, q_points, k_points, v_points, point_weights, mask)
    there = mask if pair_mask is None else mask & (pair_mask & mask[:, None]).any(-1)
    out, pair = ipa_streamed(lifted.q, lifted.k, lifted.v, z, bias_weight, there, pair_mask)
    return (*split_values(out, lifted.centre, there, v, v_points), pair.to(q.dtype))


def split_values(
    out: Float[Tensor, "b h n dv"],
    centre: Float[Tensor, "b 1 1 1 3"],
    there: Bool[Tensor, "b n"],
    v: Float[Tensor, "b n h c"],
    v_points: Float[Tensor, "b n h pv 3"],
) -> tuple[Float[Tensor, "b n h c"], Float[Tensor, "b n h pv 3"]]:
    """Take attended values and points apart, and put the points back where they came from."""
    out = out.transpose(1, 2)
    c = v.shape[-1]
    points = out[..., c:].unflatten(-1, (-1, 3)) + centre * there[:, :, None, None, None]
    return out[..., :c].to(v.dtype), points.to(v_points.dtype)


def load() -> KernelFunction:
    return run


register(operation="invariant_point_attention", name="torch", supports=supports, load=load)
