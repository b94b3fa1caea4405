"""The triangle attention update: the layers written out around the definition of triangle attention."""

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ..dtypes import widest
from ..registry import register
from ..registry.types import ALL_TRANSFORMS, KernelFunction, serves_everything
from ..triangle_attention import reference as triangle_attention
from . import Weights


def run(
    z: Float[Tensor, "b n n cz"],
    mask: Bool[Tensor, "b n n"] | None,
    weights: Weights,
    ending: bool = False,
    eps: float = 1e-5,
) -> Float[Tensor, "b n n cz"]:
    """LayerNorm, attention along each row (or column, if `ending`), gate, output projection."""
    given, dtype = z.dtype, widest(z, weights.q)
    w = weights.to(dtype)
    if ending:
        z, mask = z.transpose(1, 2), None if mask is None else mask.transpose(1, 2)
    x = F.layer_norm(z.to(dtype), z.shape[-1:], w.norm_weight, w.norm_bias, eps)
    # [b, n, m, h * d] to [b, h, n, m, d]
    q, k, v = (F.linear(x, p).unflatten(-1, (w.bias.shape[0], -1)).permute(0, 3, 1, 2, 4) for p in (w.q, w.k, w.v))
    out = triangle_attention.run(q, k, v, F.linear(x, w.bias).permute(0, 3, 1, 2), mask)
    gated = out.permute(0, 2, 3, 1, 4).flatten(3) * F.linear(x, w.gate, w.gate_bias).sigmoid()
    out = F.linear(gated, w.out, w.out_bias).to(given)
    return out.transpose(1, 2) if ending else out


def load() -> KernelFunction:
    return run


register(
    operation="triangle_attention_update",
    name="reference",
    supports=serves_everything,
    load=load,
    transforms=ALL_TRANSFORMS,
)
