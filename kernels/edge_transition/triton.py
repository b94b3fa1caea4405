"""The edge transition in Triton, a tile of pairs at a time: no hidden layer reaches memory on the way forward."""

from jaxtyping import Bool, Float
from torch import Tensor

from ..registry import register
from ..registry.types import KernelFunction
from ._rows import split_exactly
from ._tiles import reasons_against


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
    """Split the weights, then update tile by tile."""
    from ._launch import edge_transition_triton

    weights = (weight_1, bias_1, weight_2, bias_2, weight_out, bias_out, norm_weight, norm_bias)
    out: Tensor = edge_transition_triton(z, split_exactly(nodes, z.shape[-1], *weights), mask, eps)
    return out


def load() -> KernelFunction:
    from . import _launch  # noqa: F401 - here, so that a Triton that cannot be imported is found while choosing

    return run


register(
    operation="edge_transition",
    name="triton",
    needs=("triton>=3.6",),
    supports=reasons_against,
    load=load,
)
