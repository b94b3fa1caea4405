"""The triangle multiplicative update of the pair representation: each edge from the other two of all its triangles.

Jumper et al. 2021, Supplementary Algorithms 11 (outgoing edges) and 12 (incoming edges), whole: LayerNorms, gated
projections, the product over the third node, output gate.
"""

from typing import Literal, NamedTuple

import torch as pytorch  # `torch` is this package's kernel of that name
from jaxtyping import Bool, Float
from torch import Tensor

from ..dtypes import any_requires_grad, cast, floating_type, require_one_device, without_autocast
from ..hardware import tf32
from ..registry import function_for, precision, register_operation
from ..registry.types import Operation

Direction = Literal["outgoing", "incoming"]

OPERATION = register_operation(
    Operation(
        name="triangle_multiplication",
        summary="triangle multiplicative update of a pair tensor",
        dims=("n", "cz", "c"),
        options=("bias",),
    )
)


class Weights(NamedTuple):
    """The update's weights, each as a linear layer holds it; in the packed ones the left factor's rows come first.

    Boltz has no biases, OpenFold has one in each projection.
    """

    norm_in_weight: Float[Tensor, " cz"]
    norm_in_bias: Float[Tensor, " cz"]
    p_in: Float[Tensor, "2*c cz"]
    g_in: Float[Tensor, "2*c cz"]
    norm_out_weight: Float[Tensor, " c"]
    norm_out_bias: Float[Tensor, " c"]
    p_out: Float[Tensor, "cz c"]
    g_out: Float[Tensor, "cz cz"]
    p_in_bias: Float[Tensor, " 2*c"] | None = None
    g_in_bias: Float[Tensor, " 2*c"] | None = None
    p_out_bias: Float[Tensor, " cz"] | None = None
    g_out_bias: Float[Tensor, " cz"] | None = None

    def to(self, dtype: pytorch.dtype) -> "Weights":
        """All of them in another floating type."""
        return Weights._make(None if weight is None else cast(weight, dtype) for weight in self)


def triangle_multiplication(
    z: Float[Tensor, "b n n cz"],
    mask: Bool[Tensor, "b n n"] | None,
    weights: Weights,
    direction: Direction,
    *,
    eps: float = 1e-5,
    config: str = "",
) -> Float[Tensor, "b n n cz"]:
    """Compute the update that triangle multiplication adds to the pair representation.

    Outgoing: edge (i, j) from the edges (i, k) and (j, k). Incoming: from (k, i) and (k, j).

    Args:
        z: The pair representation, before its LayerNorm.
        mask: True for pairs that take part as edges of a triangle. A pair that does not still gets an update.
        weights: See `Weights`.
        direction: "outgoing" or "incoming".
        eps: The LayerNorms' epsilon.
        config: A module's kernel configuration, as its token.

    Returns:
        The update, without dropout and without z itself, in the floating type of z (under autocast, autocast's).

    Raises:
        KernelUnavailable: No kernel that the configuration allows can serve the call.
        ValueError: The direction is neither.
    """
    if direction not in ("outgoing", "incoming"):
        raise ValueError(f"triangle_multiplication: direction is 'outgoing' or 'incoming', not {direction!r}")
    require_one_device(z, mask, *weights)
    run = function_for(
        OPERATION.name,
        z,
        length=z.shape[1],
        dims={"cz": z.shape[3], "c": weights.p_out.shape[1]},
        grad=any_requires_grad(z, *weights),
        config=config,
        options=("bias",) if any(bias is not None for bias in list(weights)[8:]) else (),
    )
    dtype = floating_type(z)
    with without_autocast(z), tf32.allowance(z, precision(config)):
        out: Tensor = run(cast(z, dtype), mask, weights, direction, eps)
    return out
