"""The bias that an attention takes from the pair representation: LayerNorm and a linear layer, streamed over rows.

The LayerNorm of the whole pair representation would be as large as that itself; the bias has heads / channels of its
size. Both directions are opaque operators, as for every loop over blocks: Dynamo would compile one graph per length.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..dtypes import require_one_device, widest
from ..hardware.tf32 import as_remembered, remembering
from .blocking import block_dtype, norm_dtype, row_blocks
from .double_backward import no_double_backward
from .matmul import accumulate_
from .pair_blocks import layer_norm_backward, zeros_like_wide


class PairProjection(NamedTuple):
    """How the pair representation becomes a bias: a LayerNorm and a linear layer; the softmax would remove a constant.

    The LayerNorm's weights are both None where the layer has none.
    """

    norm_weight: Float[Tensor, " cz"] | None
    norm_bias: Float[Tensor, " cz"] | None
    weight: Float[Tensor, "h cz"]
    eps: float = 1e-5


def project(
    pairs: Float[Tensor, "b h n m"] | Float[Tensor, "b n m cz"], projection: PairProjection | None
) -> Float[Tensor, "b h n m"]:
    """The bias that a kernel adds to its logits: `pairs` itself where it is the bias already."""
    return pairs if projection is None else pair_bias(pairs, *projection)


def pair_bias(
    z: Float[Tensor, "b n m cz"],
    norm_weight: Float[Tensor, " cz"] | None,
    norm_bias: Float[Tensor, " cz"] | None,
    weight: Float[Tensor, "h cz"],
    eps: float = 1e-5,
) -> Float[Tensor, "b h n m"]:
    """Project the LayerNorm of z to one bias a head, in float32 at least: logits are sums of terms that cancel.

    Args:
        z: The pair representation.
        norm_weight: LayerNorm's scale; None for no LayerNorm at all.
        norm_bias: LayerNorm's shift.
        weight: The linear layer's weight.
        eps: LayerNorm's epsilon.
    """
    require_one_device(z, norm_weight, norm_bias, weight)
    bias: Tensor = pair_bias_streamed(z, norm_weight, norm_bias, weight, eps)
    return bias


@torch.library.custom_op("foldkernels::pair_bias_streamed", mutates_args=())
def pair_bias_streamed(
    z: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor, eps: float
) -> Tensor:
    """See `pair_bias`."""
    b, n, m, _ = z.shape
    out = z.new_empty(b, weight.shape[0], n, m, dtype=widest(z))
    with torch.autocast(z.device.type, enabled=False):
        pair_bias_into(out, z, norm_weight, norm_bias, weight, eps)
    return out


@pair_bias_streamed.register_fake
def _(z, norm_weight, norm_bias, weight, eps):  # type: ignore[no-untyped-def]
    b, n, m, _ = z.shape
    return z.new_empty(b, weight.shape[0], n, m, dtype=widest(z))


@torch.library.custom_op("foldkernels::pair_bias_streamed_backward", mutates_args=())
def pair_bias_streamed_backward(
    d_bias: Tensor, z: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of z, norm_weight, norm_bias (empty without a LayerNorm) and weight."""
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    with torch.autocast(z.device.type, enabled=False):
        sums = pair_bias_backward(dz, d_bias, z, norm_weight, norm_bias, weight, eps, add=False)
    given = (norm_weight, norm_bias, weight)
    of = [s.to(w.dtype) if w is not None else weight.new_empty(0) for s, w in zip(sums, given, strict=True)]
    return dz, of[0], of[1], of[2]


@pair_bias_streamed_backward.register_fake
def _(d_bias, z, norm_weight, norm_bias, weight, eps):  # type: ignore[no-untyped-def]
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    of = [torch.empty_like(w) if w is not None else weight.new_empty(0) for w in (norm_weight, norm_bias, weight)]
    return dz, of[0], of[1], of[2]


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    z, norm_weight, norm_bias, weight, ctx.eps = inputs
    ctx.save_for_backward(z, norm_weight, norm_bias, weight)


def _backward(ctx, d_bias):  # type: ignore[no-untyped-def]
    z, norm_weight, norm_bias, weight = ctx.saved_tensors
    dz, of_scale, of_shift, of_weight = pair_bias_streamed_backward(d_bias, z, norm_weight, norm_bias, weight, ctx.eps)
    return dz, *((of_scale, of_shift) if norm_weight is not None else (None, None)), of_weight, None


pair_bias_streamed.register_autograd(as_remembered(_backward), setup_context=remembering(_keep))
no_double_backward(pair_bias_streamed_backward, operation="attention_pair_bias", kernel="torch")


# The loops ------------------------------------------------------------------------------------------------------------


def pair_bias_into(
    out: Float[Tensor, "b h n m"],
    z: Float[Tensor, "b n m cz"],
    norm_weight: Float[Tensor, " cz"] | None,
    norm_bias: Float[Tensor, " cz"] | None,
    weight: Float[Tensor, "h cz"],
    eps: float,
) -> None:
    """Write the bias, block by block."""
    dtype = block_dtype(z)
    scale, shift = (None if w is None else w.to(norm_dtype(z)) for w in (norm_weight, norm_bias))
    project = weight.to(dtype)
    for i, rows in row_blocks(z):
        x = z[i, rows].to(dtype)
        if scale is not None:
            x = torch.layer_norm(x, x.shape[-1:], scale, shift, eps)
        # Heads first, as the attention reads them: the product of the transposes, not a transpose of the product.
        heads_first = project @ x.reshape(-1, x.shape[-1]).t()
        out[i, :, rows] = heads_first.view(-1, *x.shape[:2])


def pair_bias_backward(
    dz: Float[Tensor, "b n m cz"],
    d_bias: Float[Tensor, "b h n m"],
    z: Float[Tensor, "b n m cz"],
    norm_weight: Float[Tensor, " cz"] | None,
    norm_bias: Float[Tensor, " cz"] | None,
    weight: Float[Tensor, "h cz"],
    eps: float,
    *,
    add: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the gradient of z, or add it to what is there; the weights' are returned, in float32 at least."""
    dtype = block_dtype(z)
    scale, shift = (None if w is None else w.to(norm_dtype(z)) for w in (norm_weight, norm_bias))
    project = weight.to(dtype)
    d_weight = zeros_like_wide(weight)
    d_scale, d_shift = (zeros_like_wide(w) if w is not None else d_weight[:0, 0] for w in (norm_weight, norm_bias))
    for i, rows in row_blocks(z):
        given = z[i, rows].to(dtype).reshape(-1, z.shape[-1])
        d_heads = d_bias[i, :, rows].to(dtype).reshape(project.shape[0], -1)
        dx = d_heads.t() @ project
        if scale is None:
            accumulate_(d_weight, d_heads, given)
        else:
            assert shift is not None
            x, mean, inverse_std = torch.native_layer_norm(given, given.shape[-1:], scale, shift, eps)
            accumulate_(d_weight, d_heads, x)
            dx = layer_norm_backward(dx, given, scale, shift, d_scale, d_shift, mean, inverse_std)
        block = dx.view(z[i, rows].shape)
        if add:
            dz[i, rows] += block
        else:
            dz[i, rows] = block
    return d_scale, d_shift, d_weight
