"""The edge transition in PyTorch's own operators: exact, weights split, streamed over blocks of query rows."""

from jaxtyping import Bool, Float
from torch import Tensor

from ..registry import register
from ..registry.types import KernelFunction, serves_everything
from ._rows import split_exactly
from ._streamed import edge_transition_streamed


def run(
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
    eps: float = 1e-5,
) -> Float[Tensor, "b n n cz_out"]:
    """Split the weights, then stream."""
    weights = (weight_1, bias_1, weight_2, bias_2, weight_out, bias_out, norm_weight, norm_bias)
    out: Tensor = edge_transition_streamed(z, split_exactly(nodes, z.shape[-1], *weights), mask, eps)
    return out


def load() -> KernelFunction:
    return run


register(operation="edge_transition", name="torch", supports=serves_everything, load=load)
