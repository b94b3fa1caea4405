"""Triangle attention: along each row of the pair representation, with a bias from the triangle's third edge.

Jumper et al. 2021, Supplementary Algorithms 13 and 14, lines 5 and 6. What comes before (LayerNorm, projections) and
after (gate, output projection) is the caller's, or `triangle_attention_update`'s.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from ..dtypes import any_requires_grad, cast, floating_type, require_one_device, without_autocast
from ..hardware import tf32
from ..registry import function_for, precision, register_operation
from ..registry.types import Operation

OPERATION = register_operation(
    Operation(
        name="triangle_attention",
        summary="attention along the rows of a pair tensor, with one bias for all rows",
        dims=("m", "h", "d"),
        length="m",
        options=("rectangular",),
    )
)


def triangle_attention(
    q: Float[Tensor, "b h n m d"],
    k: Float[Tensor, "b h n m d"],
    v: Float[Tensor, "b h n m d"],
    bias: Float[Tensor, "b h m m"],
    mask: Bool[Tensor, "b n m"] | None = None,
    *,
    config: str = "",
) -> Float[Tensor, "b h n m d"]:
    """Attend within each row n, over its m entries. The kernels scale q by d**-0.5; the bias is added as it is.

    This is the starting node's orientation. The ending node's attention is the same on the transposed pair tensor.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        bias: Added to the logits: the query is its third axis, the key its last. One for all rows.
        mask: True for entries that take part as keys. A row without any gets zeros and passes no gradient; an entry
            that is no key still gets a result as a query, as in the original.
        config: A module's kernel configuration, as its token.

    Returns:
        The attended values, in the floating type of q (under autocast, autocast's).

    Raises:
        KernelUnavailable: No kernel that the configuration allows can serve the call.
    """
    _, h, n, m, d = q.shape
    require_one_device(q, k, v, bias, mask)
    run = function_for(
        OPERATION.name,
        q,
        length=m,
        dims={"h": h, "d": d},
        grad=any_requires_grad(q, k, v, bias),
        config=config,
        options=("rectangular",) if n != m else (),
    )
    dtype = floating_type(q)
    with without_autocast(q), tf32.allowance(q, precision(config)):
        out: Tensor = run(cast(q, dtype), cast(k, dtype), cast(v, dtype), cast(bias, dtype), mask)
    return out
