"""The streamed triangle multiplicative update, as custom operators; the backward computes both factors again."""

import torch
from torch import Tensor

from ..common.double_backward import no_double_backward
from ..dtypes import TensorList
from ..hardware.tf32 import as_remembered, remembering
from . import Weights
from ._channels import backward_item, forward_item, prepare


@torch.library.custom_op("foldkernels::triangle_multiplication_streamed", mutates_args=())
def triangle_multiplication_streamed(
    z: Tensor,
    mask: Tensor | None,
    weights: TensorList,
    p_in_bias: Tensor | None,
    g_in_bias: Tensor | None,
    p_out_bias: Tensor | None,
    g_out_bias: Tensor | None,
    outgoing: bool,
    eps: float,
) -> Tensor:
    """The update of z [b, n, n, cz]; `weights` are the first eight fields of `Weights`."""
    out = torch.empty_like(z, memory_format=torch.contiguous_format)
    with torch.autocast(z.device.type, enabled=False):
        w = prepare(Weights._make((*weights, p_in_bias, g_in_bias, p_out_bias, g_out_bias)), z)
        for i in range(z.shape[0]):
            forward_item(z[i], None if mask is None else mask[i], w, outgoing, eps, out[i])
    return out


@triangle_multiplication_streamed.register_fake
def _(z, mask, weights, p_in_bias, g_in_bias, p_out_bias, g_out_bias, outgoing, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(z, memory_format=torch.contiguous_format)


@torch.library.custom_op("foldkernels::triangle_multiplication_streamed_backward", mutates_args=())
def triangle_multiplication_streamed_backward(
    d_out: Tensor,
    z: Tensor,
    mask: Tensor | None,
    weights: TensorList,
    p_in_bias: Tensor | None,
    g_in_bias: Tensor | None,
    p_out_bias: Tensor | None,
    g_out_bias: Tensor | None,
    outgoing: bool,
    eps: float,
) -> TensorList:
    """The gradients of z, of each of `weights`, and of each bias, the missing ones included."""
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    given = Weights._make((*weights, p_in_bias, g_in_bias, p_out_bias, g_out_bias))
    sums = [
        torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device) for x in _all(given)
    ]
    with torch.autocast(z.device.type, enabled=False):
        w = prepare(given, z)
        for i in range(z.shape[0]):
            allowed = None if mask is None else mask[i]
            backward_item(d_out[i], z[i], allowed, w, Weights._make(sums), outgoing, eps, dz[i])
    return [dz, *(total.to(like.dtype) for total, like in zip(sums, _all(given), strict=True))]


def _all(w: Weights) -> list[Tensor]:
    """Every weight; where a bias is missing, something of its shape and type."""
    layers = (w.p_in, w.g_in, w.p_out, w.g_out)
    biases = (bias if bias is not None else layer[:, 0] for bias, layer in zip(w[8:], layers, strict=True))
    return [*w[:8], *biases]


@triangle_multiplication_streamed_backward.register_fake
def _(d_out, z, mask, weights, p_in_bias, g_in_bias, p_out_bias, g_out_bias, outgoing, eps):  # type: ignore[no-untyped-def]
    given = Weights._make((*weights, p_in_bias, g_in_bias, p_out_bias, g_out_bias))
    return [x.new_empty(x.shape) for x in (z, *_all(given))]


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    z, mask, weights, *biases, ctx.outgoing, ctx.eps = inputs
    ctx.save_for_backward(z, mask, *weights, *biases)


def _backward(ctx, d_out):  # type: ignore[no-untyped-def]
    z, mask, *rest = ctx.saved_tensors
    weights, biases = rest[:8], rest[8:]
    dz, *found = triangle_multiplication_streamed_backward(d_out, z, mask, weights, *biases, ctx.outgoing, ctx.eps)
    d_biases = [None if bias is None else gradient for bias, gradient in zip(biases, found[8:], strict=True)]
    return dz, None, found[:8], *d_biases, None, None


triangle_multiplication_streamed.register_autograd(as_remembered(_backward), setup_context=remembering(_keep))
no_double_backward(triangle_multiplication_streamed_backward, operation="triangle_multiplication", kernel="torch")
