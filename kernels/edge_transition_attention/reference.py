"""The edge transition, then invariant point attention: the definition is the two definitions, one after the other."""

from jaxtyping import Bool, Float
from torch import Tensor

from ..edge_transition import reference as edge_transition
from ..invariant_point_attention import reference as invariant_point_attention
from ..registry import register
from ..registry.types import ALL_TRANSFORMS, KernelFunction, serves_everything
from . import Attended


def run(
    nodes: Float[Tensor, "b n cn"],
    z: Float[Tensor, "b n n cz"],
    edge_weights: tuple[Tensor, ...],
    attention: tuple[Tensor, ...],
    mask: Bool[Tensor, "b n"],
    eps: float,
    keep_z: bool,
    overwrite_z: bool,
) -> Attended:
    """Update, then attend."""
    q, k, v, q_points, k_points, v_points, point_weights, bias_weight = attention
    w1, b1, w2, b2, w_out, b_out, norm_weight, norm_bias = edge_weights
    z = edge_transition.run(nodes, z, w1, b1, w2, b2, w_out, b_out, norm_weight, norm_bias, mask, eps)
    values, points, pair = invariant_point_attention.run(
        q, k, v, q_points, k_points, v_points, point_weights, z, bias_weight, mask
    )
    return Attended(z if keep_z else None, values, points, pair)


def load() -> KernelFunction:
    return run


register(
    operation="edge_transition_attention",
    name="reference",
    supports=serves_everything,
    load=load,
    transforms=ALL_TRANSFORMS,
)
