"""The streamed triangle attention update, as custom operators: a block of rows passes every layer while in cache.

Only the bias, which is h / cz of the pair tensor, is computed for all rows before the first block. The backward
computes each block's queries, keys, values and weights again.
"""

import torch
from torch import Tensor

from ..common.blocking import row_blocks
from ..common.double_backward import no_double_backward
from ..dtypes import TensorList, widest
from ..hardware.tf32 import as_remembered, remembering
from ._rows import Backward, Forward


@torch.library.custom_op("foldkernels::triangle_attention_update_streamed", mutates_args=())
def triangle_attention_update_streamed(
    z: Tensor,
    mask: Tensor | None,
    weights: TensorList,
    gate_bias: Tensor | None,
    out_bias: Tensor | None,
    ending: bool,
    eps: float,
) -> Tensor:
    """The update of z [b, n, n, cz]; `weights` are the first eight fields of `Weights`."""
    out = torch.empty_like(z, memory_format=torch.contiguous_format)
    # Columns become rows by looking at the same memory the other way round.
    z, into = (x.transpose(1, 2) if ending else x for x in (z, out))
    mask = mask.transpose(1, 2) if ending and mask is not None else mask
    with torch.autocast(out.device.type, enabled=False):
        update = Forward(z, mask, weights, gate_bias, out_bias, eps)
        for i, rows in row_blocks(z):
            into[i, rows] = update.block(i, rows)
    return out


@triangle_attention_update_streamed.register_fake
def _(z, mask, weights, gate_bias, out_bias, ending, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(z, memory_format=torch.contiguous_format)


@torch.library.custom_op("foldkernels::triangle_attention_update_streamed_backward", mutates_args=())
def triangle_attention_update_streamed_backward(
    d_out: Tensor,
    z: Tensor,
    mask: Tensor | None,
    weights: TensorList,
    gate_bias: Tensor | None,
    out_bias: Tensor | None,
    ending: bool,
    eps: float,
) -> TensorList:
    """The gradients of z, of each of `weights`, of gate_bias and of out_bias."""
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    d_out, z, into = (x.transpose(1, 2) if ending else x for x in (d_out, z, dz))
    mask = mask.transpose(1, 2) if ending and mask is not None else mask
    with torch.autocast(dz.device.type, enabled=False):
        backward = Backward(z, mask, weights, gate_bias, out_bias, eps)
        for i in range(z.shape[0]):
            # What comes through the bias is added last: 16 bits would round the sum twice.
            sums = into[i] if dz.dtype is widest(dz) else torch.empty_like(into[i], dtype=widest(dz))
            for _, rows in row_blocks(z[i : i + 1]):
                sums[rows] = backward.block_gradient(i, rows, d_out[i, rows])
            backward.add_through_bias(i, sums)
            if sums.dtype is not dz.dtype:
                into[i] = sums
        return [dz, *backward.gradients()]


@triangle_attention_update_streamed_backward.register_fake
def _(d_out, z, mask, weights, gate_bias, out_bias, ending, eps):  # type: ignore[no-untyped-def]
    like = (*weights, weights[6].new_empty(weights[6].shape[0]), weights[7].new_empty(weights[7].shape[0]))
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (z, *like)]


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    z, mask, weights, gate_bias, out_bias, ctx.ending, ctx.eps = inputs
    ctx.save_for_backward(z, mask, gate_bias, out_bias, *weights)


def _backward(ctx, d_out):  # type: ignore[no-untyped-def]
    z, mask, gate_bias, out_bias, *weights = ctx.saved_tensors
    dz, *d_weights, d_gate, d_last = triangle_attention_update_streamed_backward(
        d_out, z, mask, weights, gate_bias, out_bias, ctx.ending, ctx.eps
    )
    of_biases = (None if gate_bias is None else d_gate, None if out_bias is None else d_last)
    return dz, None, d_weights, *of_biases, None, None


triangle_attention_update_streamed.register_autograd(as_remembered(_backward), setup_context=remembering(_keep))
no_double_backward(
    triangle_attention_update_streamed_backward,
    operation="triangle_attention_update",
    kernel="torch",
    setting="triangle_attention",
)
