"""Attention over a sequence with a bias from the pair representation.

Abramson et al. 2024 (AlphaFold 3), Supplementary Algorithm 24, lines 3 and 5 (the bias among them); Boltz's
AttentionPairBias. What comes before (LayerNorm, projections of q, k, v) and after (gate, output) is the module's.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from ..common.pair_projection import PairProjection, pair_bias
from ..dtypes import any_requires_grad, cast, floating_type, require_one_device, without_autocast
from ..hardware import tf32
from ..registry import function_for, precision, register_operation
from ..registry.types import Operation

__all__ = ["OPERATION", "PairProjection", "attention_pair_bias", "pair_bias"]

OPERATION = register_operation(
    Operation(
        name="attention_pair_bias",
        summary="attention over a sequence with a dense bias, given or projected from the pair representation",
        dims=("m", "h", "d"),
        length="m",
        options=("cross",),
    )
)


def attention_pair_bias(
    q: Float[Tensor, "s n h d"],
    k: Float[Tensor, "s m h d"],
    v: Float[Tensor, "s m h d"],
    mask: Bool[Tensor, "s m"] | Bool[Tensor, "b m"] | None,
    *,
    bias: Float[Tensor, "b h n m"] | None = None,
    z: Float[Tensor, "b n m cz"] | None = None,
    projection: PairProjection | None = None,
    config: str = "",
) -> Float[Tensor, "s n h d"]:
    """Attend over the keys that `mask` names. The kernels scale q by d**-0.5; the bias is added as it is.

    The bias is given, or is projected from z in one pass over it: its LayerNorm is never held as a whole.

    Args:
        q: Queries.
        k: Keys; there may be another number of them.
        v: Values.
        mask: True for keys that take part. An item without any gets zeros and passes no gradient; a query that is
            masked as a key still gets a result, as in the original.
        bias: The bias itself, such as `pair_bias` gives; or
        z: the pair representation, with
        projection: its way to the bias.
        config: A module's kernel configuration, as its token.

    Shapes:
        s is b times the multiplicity: items i * s / b to (i + 1) * s / b share bias i.

    Returns:
        The attended values, in the floating type of q (under autocast, autocast's).

    Raises:
        KernelUnavailable: No kernel that the configuration allows can serve the call.
        ValueError: Both or neither of bias and z are given, z without its projection, or s is no multiple of b.
    """
    if (bias is None) == (z is None) or (z is None) != (projection is None):
        raise ValueError("attention_pair_bias: give either `bias`, or `z` with `projection`")
    pairs = z if bias is None else bias
    assert pairs is not None
    s, n, h, d = q.shape
    m = k.shape[1]
    if s % pairs.shape[0]:
        raise ValueError(f"attention_pair_bias: {s} sequences cannot share {pairs.shape[0]} pair tensors")
    weights = (projection.norm_weight, projection.norm_bias, projection.weight) if projection is not None else ()
    require_one_device(q, k, v, pairs, mask, *weights)
    run = function_for(
        OPERATION.name,
        q,
        length=m,
        dims={"h": h, "d": d},
        grad=any_requires_grad(q, k, v, pairs, *weights),
        config=config,
        options=("cross",) if n != m else (),
    )
    dtype = floating_type(q)
    with without_autocast(q), tf32.allowance(q, precision(config)):
        if mask is not None and mask.shape[0] != s:
            mask = mask.repeat_interleave(s // mask.shape[0], 0)
        given = cast(bias, dtype) if bias is not None else z
        out: Tensor = run(cast(q, dtype), cast(k, dtype), cast(v, dtype), given, mask, projection)
    return out
