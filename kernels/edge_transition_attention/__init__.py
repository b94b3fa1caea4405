"""An edge transition and the invariant point attention that reads its result, in one pass over the pair representation.

In Multiflow's trunk both see the same residues, so a block of rows can be updated and attended while it is in cache,
and the last pair representation need never be written. The maths is that of the two operations.
"""

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from ..dtypes import any_requires_grad, floating_type, require_one_device, without_autocast
from ..hardware import tf32
from ..registry import common_kernel, function_for, precision, register_operation
from ..registry.types import Operation

OPERATION = register_operation(
    Operation(
        name="edge_transition_attention",
        summary="an edge transition and the invariant point attention on its result, in one pass",
        dims=("n", "cn", "cz", "h", "c", "p", "pv"),
        fuses=("edge_transition", "invariant_point_attention"),
    )
)


class Attended(NamedTuple):
    """What comes out: the new pair representation (None where nobody reads it), and IPA's three results."""

    z: Float[Tensor, "b n n cz"] | None
    values: Float[Tensor, "b n h c"]
    points: Float[Tensor, "b n h pv 3"]
    pair: Float[Tensor, "b n h cz"]


def pays(z: Tensor, *, dims: dict[str, int], grad: bool, config: str) -> bool:
    """Whether one pass serves: both operations run the same kernel here, and the fused one has it too."""
    # A z that autocast would cast, or whose precision is lowered, is the two operations' business.
    same_type = floating_type(z) is z.dtype
    return same_type and common_kernel(OPERATION.name, z, length=z.shape[1], dims=dims, grad=grad, config=config)


def edge_transition_attention(
    nodes: Float[Tensor, "b n cn"],
    z: Float[Tensor, "b n n cz"],
    edge_weights: tuple[Tensor, ...],
    q: Float[Tensor, "b n h c"],
    k: Float[Tensor, "b n h c"],
    v: Float[Tensor, "b n h c"],
    q_points: Float[Tensor, "b n h p 3"],
    k_points: Float[Tensor, "b n h p 3"],
    v_points: Float[Tensor, "b n h pv 3"],
    point_weights: Float[Tensor, " h"],
    bias_weight: Float[Tensor, "h cz"],
    mask: Bool[Tensor, "b n"],
    *,
    eps: float = 1e-5,
    keep_z: bool = True,
    overwrite_z: bool = False,
    config: str = "",
) -> Attended:
    """Update z, and attend to the result.

    Args:
        nodes: As `edge_transition` takes it.
        z: The pair representation.
        edge_weights: The edge transition's eight weights, in its order.
        q: As `invariant_point_attention` takes it, and so are the rest.
        k: Keys.
        v: Values.
        q_points: Query points, global frame, nanometres.
        k_points: Key points.
        v_points: Value points.
        point_weights: One weight a head.
        bias_weight: The weight of the linear map from z to the logits' bias.
        mask: True for residues that take part.
        eps: The edge transition's LayerNorm's epsilon.
        keep_z: Whether the new z is wanted.
        overwrite_z: Whether the new z may take the place of the old one. Ignored where a backward pass may follow.
        config: A module's kernel configuration, as its token.

    Raises:
        KernelUnavailable: No kernel that the configuration allows can serve the call.
    """
    read = (nodes, z, *edge_weights, q, k, v, q_points, k_points, v_points, point_weights, bias_weight)
    require_one_device(*read, mask)
    grad = any_requires_grad(*read)
    run = function_for(
        OPERATION.name,
        z,
        length=z.shape[1],
        dims={
            "cn": nodes.shape[-1],
            "cz": z.shape[-1],
            "h": q.shape[2],
            "c": q.shape[3],
            "p": q_points.shape[3],
            "pv": v_points.shape[3],
        },
        grad=grad,
        config=config,
    )
    attention = (q, k, v, q_points, k_points, v_points, point_weights, bias_weight)
    with without_autocast(z), tf32.allowance(z, precision(config)):
        out: Attended = run(nodes, z, edge_weights, attention, mask, eps, keep_z, overwrite_z and not grad)
    return out
