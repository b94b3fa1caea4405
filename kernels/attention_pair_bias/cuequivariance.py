"""Attention with a pair bias through cuEquivariance's triangle attention: the sequences that share a bias are its rows.

The library also has an `attention_pair_bias`, with the LayerNorm of the sequence, all projections and the gate inside.
It cannot serve here: Boltz-2 normalises the sequence before it, keys may be others than the queries, and a caller may
hold the projections already. What is left of the work, attention under a dense bias, is what triangle attention does.
"""

from types import ModuleType

from jaxtyping import Bool, Float
from torch import Tensor

from ..common.cuequivariance_limits import ATTENTION_THRESHOLDS, NEEDS, against_attention
from ..common.pair_projection import PairProjection, project
from ..hardware.machine import imported
from ..registry import register
from ..registry.types import KernelFunction, Reason, Request
from ..triangle_attention.cuequivariance import attend

library: ModuleType


def supports(request: Request) -> list[Reason]:
    """Every reason against `request`."""
    reasons = against_attention(request)
    if "cross" in request.options:
        reasons.append(
            Reason("cuEquivariance itself runs plain PyTorch for few queries, however many keys", "use kernel 'torch'")
        )
    return reasons


def run(
    q: Float[Tensor, "s n h d"],
    k: Float[Tensor, "s m h d"],
    v: Float[Tensor, "s m h d"],
    pairs: Float[Tensor, "b h n m"] | Float[Tensor, "b n m cz"],
    mask: Bool[Tensor, "s m"] | None = None,
    projection: PairProjection | None = None,
) -> Float[Tensor, "s n h d"]:
    """Project the bias, attend."""
    bias = project(pairs, projection)
    b = bias.shape[0]
    # [s, n, h, d] to [b, s / b, h, n, d]
    q, k, v = (x.unflatten(0, (b, -1)).transpose(2, 3) for x in (q, k, v))
    out = attend(library, q, k, v, bias, None if mask is None else mask.unflatten(0, (b, -1)))
    return out.transpose(2, 3).flatten(0, 1)


def load() -> KernelFunction:
    global library
    library = imported("cuequivariance_torch", having="triangle_attention")
    return run


register(
    operation="attention_pair_bias",
    name="cuequivariance",
    needs=NEEDS,
    supports=supports,
    load=load,
    deterministic=False,
    thresholds=ATTENTION_THRESHOLDS,
)
