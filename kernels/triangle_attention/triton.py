"""Triangle attention in Triton: no logit reaches memory, and the bias's gradient is summed without atomics."""

from jaxtyping import Bool, Float
from torch import Tensor

from ..biased_attention._tiles import reasons_against
from ..registry import register
from ..registry.types import KernelFunction


def run(
    q: Float[Tensor, "b h n m d"],
    k: Float[Tensor, "b h n m d"],
    v: Float[Tensor, "b h n m d"],
    bias: Float[Tensor, "b h m m"],
    mask: Bool[Tensor, "b n m"] | None = None,
) -> Float[Tensor, "b h n m d"]:
    """Attend, block of queries by block of queries."""
    from ._launch import triangle_attention_triton

    out: Tensor = triangle_attention_triton(q, k, v, bias, mask)[0]
    return out


def load() -> KernelFunction:
    from . import _launch  # noqa: F401 - here, so that a Triton that cannot be imported is found while choosing

    return run


register(
    operation="triangle_attention",
    name="triton",
    needs=("triton>=3.6",),
    supports=reasons_against,
    load=load,
)
