"""The whole triangle attention update in one pass: LayerNorm, projections, attention, gate, output projection.

Jumper et al. 2021, Supplementary Algorithms 13 (starting node) and 14 (ending node). Queries, keys, values and gate of
all rows together are four pair tensors; streamed over rows they need never exist. Where that does not serve, the
update is `triangle_attention` between plain PyTorch layers: the maths is the same.
"""

from typing import Any, NamedTuple

import torch as pytorch  # `torch` is this package's kernel of that name
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ..dtypes import any_requires_grad, cast, floating_type, require_one_device, without_autocast
from ..hardware import tf32
from ..registry import common_kernel, function_for, precision, register_operation
from ..registry.types import Operation
from ..triangle_attention import triangle_attention

OPERATION = register_operation(
    Operation(
        name="triangle_attention_update",
        summary="LayerNorm, projections, triangle attention, gate and output projection in one pass",
        dims=("m", "h", "d", "cz"),
        length="m",
        fuses=("triangle_attention",),
    )
)


class Weights(NamedTuple):
    """The update's weights, each as a linear layer holds it. Boltz has no biases, OpenFold `gate_bias` and `out_bias`.

    Head i of the queries, keys, values and the gate is rows i * d to (i + 1) * d of their weights.
    """

    norm_weight: Float[Tensor, " cz"]
    norm_bias: Float[Tensor, " cz"]
    bias: Float[Tensor, "h cz"]
    q: Float[Tensor, "h*d cz"]
    k: Float[Tensor, "h*d cz"]
    v: Float[Tensor, "h*d cz"]
    gate: Float[Tensor, "h*d cz"]
    out: Float[Tensor, "cz h*d"]
    gate_bias: Float[Tensor, " h*d"] | None = None
    out_bias: Float[Tensor, " cz"] | None = None

    def to(self, dtype: pytorch.dtype) -> "Weights":
        """All of them in another floating type."""
        return Weights._make(None if weight is None else cast(weight, dtype) for weight in self)


def triangle_attention_update(
    z: Float[Tensor, "b n n cz"],
    mask: Bool[Tensor, "b n n"] | None,
    weights: Weights,
    *,
    ending: bool = False,
    eps: float = 1e-5,
    config: str = "",
) -> Float[Tensor, "b n n cz"]:
    """Compute the update that triangle attention adds to the pair representation.

    Args:
        z: The pair representation, before its LayerNorm.
        mask: True for pairs that take part as keys.
        weights: See `Weights`.
        ending: Attend along columns (around the ending node) instead of rows.
        eps: LayerNorm's epsilon.
        config: A module's kernel configuration, as its token: what it says of `triangle_attention` holds.

    Returns:
        The update, without dropout and without z itself, in the floating type of z (under autocast, autocast's).

    Raises:
        KernelUnavailable: No kernel that the configuration allows can serve the call.
    """
    require_one_device(z, mask, *weights)
    # A z that autocast would cast is the separate layers' business: they know what to leave in float32.
    if floating_type(z) is z.dtype and common_kernel(OPERATION.name, z, config=config, **_sizes(z, weights)):
        return one_pass(z, mask, weights, ending=ending, eps=eps, config=config)
    return layers(z, mask, weights, ending=ending, eps=eps, config=config)


def _sizes(z: Tensor, weights: Weights) -> dict[str, Any]:
    heads = weights.bias.shape[0]
    dims = {"h": heads, "d": weights.q.shape[0] // heads, "cz": z.shape[3]}
    return {"length": z.shape[1], "dims": dims, "grad": any_requires_grad(z, *weights)}


def one_pass(
    z: Float[Tensor, "b n n cz"],
    mask: Bool[Tensor, "b n n"] | None,
    weights: Weights,
    *,
    ending: bool,
    eps: float,
    config: str,
) -> Float[Tensor, "b n n cz"]:
    """The update by a kernel that does all of it."""
    run = function_for(OPERATION.name, z, config=config, **_sizes(z, weights))
    dtype = floating_type(z)
    with without_autocast(z), tf32.allowance(z, precision(config)):
        out: Tensor = run(cast(z, dtype), mask, weights, ending, eps)
    return out


def layers(
    z: Float[Tensor, "b n n cz"],
    mask: Bool[Tensor, "b n n"] | None,
    weights: Weights,
    *,
    ending: bool,
    eps: float,
    config: str,
) -> Float[Tensor, "b n n cz"]:
    """The update as plain layers around `triangle_attention`."""
    heads = weights.bias.shape[0]
    if ending:
        z, mask = z.transpose(1, 2), None if mask is None else mask.transpose(1, 2)
    x = F.layer_norm(z, z.shape[-1:], weights.norm_weight, weights.norm_bias, eps)
    q, k, v = (
        F.linear(x, weight).unflatten(-1, (heads, -1)).permute(0, 3, 1, 2, 4)
        for weight in (weights.q, weights.k, weights.v)
    )
    bias = F.linear(x, weights.bias).permute(0, 3, 1, 2)
    out = triangle_attention(q, k, v, bias, mask, config=config).permute(0, 2, 3, 1, 4).flatten(3)
    out = F.linear(out * F.linear(x, weights.gate, weights.gate_bias).sigmoid(), weights.out, weights.out_bias)
    return out.transpose(1, 2) if ending else out
