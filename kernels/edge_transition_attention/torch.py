"""The edge transition and invariant point attention in one streamed pass: a row of z is read and written once."""

from jaxtyping import Bool, Float
from torch import Tensor

from ..dtypes import widest
from ..edge_transition._rows import split
from ..invariant_point_attention._rows import lift
from ..invariant_point_attention.torch import split_values
from ..registry import register
from ..registry.types import KernelFunction, Reason, Request
from . import Attended
from ._streamed import fused_streamed, fused_streamed_


def supports(request: Request) -> list[Reason]:
    """Every reason against `request`."""
    if request.device != "cpu":
        # What one pass saves is traffic between a CPU's cache and its memory.
        return [Reason("one pass pays on a CPU only", "run the two operations one after the other")]
    return []


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
    """Split the weights, lift the queries, stream."""
    q, k, v, q_points, k_points, v_points, point_weights, bias_weight = attention
    dtype = widest(nodes, edge_weights[0])
    parts = list(split(nodes.to(dtype), z.shape[-1], *(weight.to(dtype) for weight in edge_weights)))
    lifted = lift(q, k, v, q_points, k_points, v_points, point_weights, mask)
    if overwrite_z:
        out, pair = fused_streamed_(z, parts, lifted.q, lifted.k, lifted.v, bias_weight, mask, eps, keep_z)
        new_z = z
    else:
        new_z, out, pair = fused_streamed(z, parts, lifted.q, lifted.k, lifted.v, bias_weight, mask, eps, keep_z)
    values, points = split_values(out, lifted.centre, mask, v, v_points)
    return Attended(new_z if keep_z else None, values, points, pair.to(q.dtype))


def load() -> KernelFunction:
    return run


register(operation="edge_transition_attention", name="torch", supports=supports, load=load)
