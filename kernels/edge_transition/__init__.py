"""Edge transition: the update of the pair representation from itself and from the two residues of each pair.

Yim et al. 2023 (FrameDiff, section "edge update"), as Multiflow and its relatives use it: a two-layer perceptron with a
residual connection on [z_ij, n_i, n_j], then a linear layer and a LayerNorm.
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
        name="edge_transition",
        summary="pair update: a perceptron on [z_ij, n_i, n_j] with a residual, then a linear layer and LayerNorm",
        dims=("n", "cn", "cz", "cz_out"),
    )
)


def edge_transition(
    nodes: Float[Tensor, "b n cn"],
    z: Float[Tensor, "b n n cz"],
    weight_1: Float[Tensor, "hidden hidden"],
    bias_1: Float[Tensor, " hidden"],
    weight_2: Float[Tensor, "hidden hidden"],
    bias_2: Float[Tensor, " hidden"],
    weight_out: Float[Tensor, "cz_out hidden"],
    bias_out: Float[Tensor, " cz_out"],
    norm_weight: Float[Tensor, " cz_out"],
    norm_bias: Float[Tensor, " cz_out"],
    mask: Bool[Tensor, "b n"] | None = None,
    *,
    eps: float = 1e-5,
    config: str = "",
) -> Float[Tensor, "b n n cz_out"]:
    """Update every pair from itself and its two residues. `hidden` is cz + 2 cn, in the order [z_ij, n_i, n_j].

    Args:
        nodes: The residues' share, already projected (Multiflow's `initial_embed`).
        z: The pair representation.
        weight_1: First layer of the perceptron.
        bias_1: Its bias.
        weight_2: Second layer.
        bias_2: Its bias.
        weight_out: The linear layer after the residual connection.
        bias_out: Its bias.
        norm_weight: LayerNorm's scale.
        norm_bias: LayerNorm's shift.
        mask: True for residues that take part; a pair with a masked residue becomes zero and passes no gradient.
        eps: LayerNorm's epsilon.
        config: A module's kernel configuration, as its token.

    Returns:
        The new pair representation, in the floating type that z came in (under autocast, autocast's).

    Raises:
        KernelUnavailable: No kernel that the configuration allows can serve the call.
    """
    weights = (weight_1, bias_1, weight_2, bias_2, weight_out, bias_out, norm_weight, norm_bias)
    require_one_device(z, nodes, mask, *weights)
    run = function_for(
        OPERATION.name,
        z,
        length=z.shape[1],
        dims={"cn": nodes.shape[-1], "cz": z.shape[-1], "cz_out": weight_out.shape[0]},
        grad=any_requires_grad(nodes, z, *weights),
        config=config,
    )
    dtype = floating_type(z)
    rounded = dtype is pytorch.float32 and precision(config) == "bfloat16"
    with without_autocast(z), tf32.allowance(z, precision(config)):
        out: Tensor = run(nodes, cast(z, pytorch.bfloat16) if rounded else cast(z, dtype), *weights, mask, eps)
    return cast(out, dtype)
