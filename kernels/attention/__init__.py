"""Self-attention over a padded sequence: scaled dot products, a softmax over the tokens that are there.

Vaswani et al. 2017, section 3.2.1. Multiflow's sequence transformer and ESM-2 use it.
"""

import torch as pytorch  # `torch` is this package's kernel of that name
from jaxtyping import Bool, Float
from torch import Tensor

from ..dtypes import any_requires_grad, cast, floating_type, require_one_device, without_autocast
from ..hardware import tf32
from ..registry import function_for, precision, register_operation
from ..registry.types import Operation

OPERATION = register_operation(
    Operation(
        name="attention",
        summary="self-attention over a padded sequence",
        dims=("n", "h", "d"),
        options=("dropout", "maps"),
    )
)


def attention(
    q: Float[Tensor, "b n h d"],
    k: Float[Tensor, "b n h d"],
    v: Float[Tensor, "b n h d"],
    mask: Bool[Tensor, "b n"] | None = None,
    *,
    dropout: float = 0.0,
    config: str = "",
) -> Float[Tensor, "b n h d"]:
    """Attend over the tokens that `mask` names. The kernels scale by d**-0.5.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: True for tokens that are there. A masked token is no key; as a query it gets zeros and passes no gradient.
        dropout: Probability of dropping an attention weight. Drawn here, so that every kernel sees the same draw.
        config: A module's kernel configuration, as its token.

    Returns:
        The attended values, in the floating type of q (under autocast, autocast's).

    Raises:
        KernelUnavailable: No kernel that the configuration allows can serve the call.
    """
    keep = None
    b, n, h, d = q.shape
    if dropout > 0.0:
        keep = pytorch.empty(b, h, n, n, device=q.device, dtype=pytorch.bool).bernoulli_(1.0 - dropout)
    require_one_device(q, k, v, mask)
    run = function_for(
        OPERATION.name,
        q,
        length=n,
        dims={"h": h, "d": d},
        grad=any_requires_grad(q, k, v),
        config=config,
        options=("dropout",) if keep is not None else (),
    )
    dtype = floating_type(q)
    with without_autocast(q), tf32.allowance(q, precision(config)):
        out: Tensor = run(cast(q, dtype), cast(k, dtype), cast(v, dtype), mask, keep, dropout)
    return out


def attention_maps(
    q: Float[Tensor, "b i h d"],
    k: Float[Tensor, "b j h d"],
    mask: Bool[Tensor, "b j"] | None = None,
    *,
    config: str = "",
) -> Float[Tensor, "b h i j"]:
    """The weights themselves: of some queries, or all, over every key. Only kernels that form them serve.

    Args:
        q: Queries; as many as are wanted.
        k: Keys.
        mask: True for keys that are there; the others get a weight of zero. Queries are not masked.
        config: A module's kernel configuration, as its token.

    Returns:
        Softmax weights, in float32 at least: each row sums to one, or is zero where no key is there.

    Raises:
        KernelUnavailable: No kernel that the configuration allows forms the weights.
    """
    require_one_device(q, k, mask)
    run = function_for(
        OPERATION.name,
        q,
        length=k.shape[1],
        dims={"h": q.shape[2], "d": q.shape[3]},
        grad=any_requires_grad(q, k),
        config=config,
        options=("maps",),
    )
    dtype = floating_type(q)
    with without_autocast(q), tf32.allowance(q, precision(config)):
        maps: Tensor = run(cast(q, dtype), cast(k, dtype), None, mask)
    return maps
