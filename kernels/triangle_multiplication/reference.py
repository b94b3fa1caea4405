"""The triangle multiplicative update, written out: the function that every other kernel must compute."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ..dtypes import widest
from ..registry import register
from ..registry.types import ALL_TRANSFORMS, KernelFunction, serves_everything
from . import Direction, Weights

TRIANGLES: dict[Direction, str] = {"outgoing": "bikc,bjkc->bijc", "incoming": "bkic,bkjc->bijc"}


def run(
    z: Float[Tensor, "b n n cz"],
    mask: Bool[Tensor, "b n n"] | None,
    weights: Weights,
    direction: Direction,
    eps: float = 1e-5,
) -> Float[Tensor, "b n n cz"]:
    """LayerNorm, gated projections, product over the third node, LayerNorm, gated projection."""
    given, dtype = z.dtype, widest(z, weights.p_in)
    w = weights.to(dtype)
    x = F.layer_norm(z.to(dtype), z.shape[-1:], w.norm_in_weight, w.norm_in_bias, eps)
    edges = F.linear(x, w.p_in, w.p_in_bias) * F.linear(x, w.g_in, w.g_in_bias).sigmoid()
    if mask is not None:
        edges = edges.masked_fill(~mask[..., None], 0.0)
    left, right = edges.chunk(2, dim=-1)
    product = torch.einsum(TRIANGLES[direction], left, right)
    out = F.layer_norm(product, product.shape[-1:], w.norm_out_weight, w.norm_out_bias, eps)
    out = F.linear(out, w.p_out, w.p_out_bias) * F.linear(x, w.g_out, w.g_out_bias).sigmoid()
    return out.to(given)


def load() -> KernelFunction:
    return run


register(
    operation="triangle_multiplication",
    name="reference",
    supports=serves_everything,
    load=load,
    transforms=ALL_TRANSFORMS,
)
