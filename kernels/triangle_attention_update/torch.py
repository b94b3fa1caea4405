"""The triangle attention update in PyTorch's operators, streamed over rows: only the result is a pair tensor."""

from jaxtyping import Bool, Float
from torch import Tensor

from ..registry import register
from ..registry.types import KernelFunction, serves_everything
from . import Weights
from ._streamed import triangle_attention_update_streamed


def run(
    z: Float[Tensor, "b n n cz"],
    mask: Bool[Tensor, "b n n"] | None,
    weights: Weights,
    ending: bool = False,
    eps: float = 1e-5,
) -> Float[Tensor, "b n n cz"]:
    """Stream over rows, or over columns if `ending`."""
    out: Tensor = triangle_attention_update_streamed(
        z, mask, list(weights)[:8], weights.gate_bias, weights.out_bias, ending, eps
    )
    return out


def load() -> KernelFunction:
    return run


register(operation="triangle_attention_update", name="torch", supports=serves_everything, load=load)
