"""Invariant point attention (IPA): attention by scalars, by points in space, and by the pair representation.

Jumper et al. 2021, Supplementary Algorithm 22, lines 7 to 11. What comes before (projections, moving points into the
global frame) and after (back into the local frame, the output projection) is the module's.
"""

import torch as pytorch  # `torch` is this package's kernel of that name
from jaxtyping import Bool, Float
from torch import Tensor

from ..dtypes import any_requires_grad, cast, floating_type, in_use, require_one_device, without_autocast
from ..hardware import tf32
from ..registry import function_for, precision, register_operation
from ..registry.types import Operation

OPERATION = register_operation(
    Operation(
        name="invariant_point_attention",
        summary="attention by scalars, distances between points, and the pair representation",
        dims=("n", "h", "c", "p", "pv", "cz"),
        options=("pair_mask", "logit_dropout"),
    )
)


def invariant_point_attention(
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
    *,
    logit_bias: Float[Tensor, " h"] | None = None,
    logit_dropout: float = 0.0,
    config: str = "",
) -> tuple[Float[Tensor, "b n h c"], Float[Tensor, "b n h pv 3"], Float[Tensor, "b n h cz"]]:
    """Attend over residues; the mean of z over the attention comes back undivided by any projection.

    All scaling happens in the kernels: q is given as projected, `point_weights` as the softplus of the learned weights.
    Points are in the global frame, in nanometres, and are computed in float32 at least, whatever the rest is.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        q_points: Query points, global frame, nanometres.
        k_points: Key points, likewise.
        v_points: Value points, likewise.
        point_weights: One weight a head, not negative.
        z: The pair representation. It is only read. Under `precision: bfloat16` a GPU of NVIDIA's or AMD's gets it
            rounded; a CPU and a Mac read it as it is, which is faster there.
        bias_weight: The weight of the linear map from z to the logits' bias.
        mask: True for residues that take part, as queries and as keys.
        pair_mask: True where a query (second axis) may attend to a key (third axis).
        logit_bias: The bias of that linear map. The softmax removes it, so it matters under `logit_dropout` only.
        logit_dropout: Probability of dropping a logit (its value becomes 0), as Multiflow's layer does in training.
            The mask of a key outlives it. Drawn here, so that every kernel sees the same draw.
        config: A module's kernel configuration, as its token.

    Returns:
        The attended values, the attended points (global frame) and the attended pair representation. A query that is
        masked, or has no key, gets zeros and passes no gradient.

    Raises:
        KernelUnavailable: No kernel that the configuration allows can serve the call.
    """
    keep = None
    b, n, h, c = q.shape
    if logit_dropout > 0.0:
        keep = pytorch.empty(b, h, n, n, device=q.device).bernoulli_(1.0 - logit_dropout).div_(1.0 - logit_dropout)
    require_one_device(q, k, v, q_points, k_points, v_points, point_weights, z, bias_weight, mask, pair_mask)
    run = function_for(
        OPERATION.name,
        q,
        length=n,
        dims={"h": h, "c": c, "p": q_points.shape[3], "pv": v_points.shape[3], "cz": z.shape[3]},
        grad=any_requires_grad(q, k, v, q_points, k_points, v_points, point_weights, z, bias_weight),
        config=config,
        options=in_use(pair_mask=pair_mask, logit_dropout=keep),
    )
    dtype = floating_type(q)
    # Distances are differences of large numbers: points are never held in 16 bits.
    point_dtype = pytorch.float64 if dtype is pytorch.float64 else pytorch.float32
    # A CPU and a Mac multiply z by a few heads in float32, whatever it is held in: to round it first gains nothing.
    narrow = z.device.type not in ("cpu", "mps")
    rounded = narrow and dtype is pytorch.float32 and precision(config) == "bfloat16"
    with without_autocast(q), tf32.allowance(q, precision(config)):
        out: tuple[Tensor, Tensor, Tensor] = run(
            cast(q, dtype),
            cast(k, dtype),
            cast(v, dtype),
            cast(q_points, point_dtype),
            cast(k_points, point_dtype),
            cast(v_points, point_dtype),
            cast(point_weights, point_dtype),
            cast(z, pytorch.bfloat16) if rounded else z if z.dtype is pytorch.bfloat16 else cast(z, dtype),
            cast(bias_weight, dtype),
            mask,
            pair_mask,
            None if logit_bias is None else cast(logit_bias, dtype),
            keep,
        )
    return out
