"""The triangle multiplicative update in PyTorch's operators, streamed: projections by rows, the product by channels."""

from jaxtyping import Bool, Float
from torch import Tensor

from ..registry import register
from ..registry.types import KernelFunction, serves_everything
from . import Direction, Weights
from ._streamed import triangle_multiplication_streamed


def run(
    z: Float[Tensor, "b n n cz"],
    mask: Bool[Tensor, "b n n"] | None,
    weights: Weights,
    direction: Direction,
    eps: float = 1e-5,
) -> Float[Tensor, "b n n cz"]:
    """Stream."""
    out: Tensor = triangle_multiplication_streamed(
        z, mask, list(weights)[:8], *list(weights)[8:], direction == "outgoing", eps
    )
    return out


def load() -> KernelFunction:
    return run


register(operation="triangle_multiplication", name="torch", supports=serves_everything, load=load)
