"""Triangle attention through PyTorch's fused attention, a few rows at a time: logits are never held for all rows."""

from jaxtyping import Bool, Float
from torch import Tensor

from ..registry import register
from ..registry.types import KernelFunction, serves_everything
from ._streamed import triangle_attention_streamed


def run(
    q: Float[Tensor, "b h n m d"],
    k: Float[Tensor, "b h n m d"],
    v: Float[Tensor, "b h n m d"],
    bias: Float[Tensor, "b h m m"],
    mask: Bool[Tensor, "b n m"] | None = None,
) -> Float[Tensor, "b h n m d"]:
    """Attend, row block by row block."""
    out: Tensor = triangle_attention_streamed(q, k, v, bias, mask)
    return out


def load() -> KernelFunction:
    return run


register(operation="triangle_attention", name="torch", supports=serves_everything, load=load)
