"""Edge transition, as Multiflow writes it: the function that every other kernel must compute."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ..dtypes import widest
from ..registry import register
from ..registry.types import ALL_TRANSFORMS, KernelFunction, serves_everything


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
    """Perceptron with a residual on [z_ij, n_i, n_j], linear layer, LayerNorm."""
    given, dtype = z.dtype, widest(nodes, z, weight_1)
    weights = (weight_1, bias_1, weight_2, bias_2, weight_out, bias_out, norm_weight, norm_bias)
    weight_1, bias_1, weight_2, bias_2, weight_out, bias_out, norm_weight, norm_bias = (w.to(dtype) for w in weights)
    n = z.shape[1]
    nodes = nodes.to(dtype)
    pairs = torch.cat(
        [z.to(dtype), nodes[:, :, None].expand(-1, -1, n, -1), nodes[:, None].expand(-1, n, -1, -1)], dim=-1
    )
    hidden = F.relu(F.linear(pairs, weight_1, bias_1))
    hidden = F.relu(F.linear(hidden, weight_2, bias_2))
    out = F.linear(hidden + pairs, weight_out, bias_out)
    out = F.layer_norm(out, out.shape[-1:], norm_weight, norm_bias, eps)
    if mask is not None:
        out = out.masked_fill(~(mask[:, :, None] & mask[:, None])[..., None], 0.0)
    return out.to(given)


def load() -> KernelFunction:
    return run


register(
    operation="edge_transition", name="reference", supports=serves_everything, load=load, transforms=ALL_TRANSFORMS
)
