"""The streamed core of the edge transition, as custom operators: one pass over blocks of rows, forward and backward.

A loop over row blocks would make Dynamo compile one graph per length, so both directions are opaque operators. The
backward computes the hidden layers again instead of keeping them.
"""

import torch
from torch import Tensor

from ..common.blocking import Scratch, block_dtype, row_blocks
from ..dtypes import TensorList, item_masks
from ._autograd import differentiate
from ._rows import Split, backward_rows, forward_rows, hidden_rows, prepare, zero_gradients


@torch.library.custom_op("foldkernels::edge_transition_streamed", mutates_args=())
def edge_transition_streamed(z: Tensor, parts: TensorList, mask: Tensor | None, eps: float) -> Tensor:
    """Update z [b, n, n, cz]; `parts` are the fields of `Split`."""
    dtype = block_dtype(z)
    prepared = prepare(Split(*parts), z)
    out = z.new_empty(*z.shape[:3], prepared.weight_out.shape[0])
    scratch, masks = Scratch(z, dtype), item_masks(mask, z.shape[0])
    with torch.autocast(z.device.type, enabled=False):
        for i, rows in row_blocks(z):
            out[i, rows] = forward_rows(prepared, i, rows, z[i, rows].to(dtype), masks[i], eps, scratch)
    return out


@edge_transition_streamed.register_fake
def _(z, parts, mask, eps):  # type: ignore[no-untyped-def]
    return z.new_empty(*z.shape[:3], Split(*parts).weight_out.shape[0])


@torch.library.custom_op("foldkernels::edge_transition_streamed_backward", mutates_args=())
def edge_transition_streamed_backward(
    d_out: Tensor, z: Tensor, parts: TensorList, mask: Tensor | None, eps: float
) -> TensorList:
    """The gradients of z and of each part, in this order."""
    dtype = block_dtype(z)
    prepared = prepare(Split(*parts), z)
    gradients = zero_gradients(Split(*parts))
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    scratch, masks = Scratch(z, dtype), item_masks(mask, z.shape[0])
    with torch.autocast(z.device.type, enabled=False):
        for i, rows in row_blocks(z):
            z_rows = z[i, rows].to(dtype)
            hidden = hidden_rows(prepared, i, rows, z_rows, scratch)
            d_rows = d_out[i, rows]
            dz[i, rows] = backward_rows(prepared, gradients, i, rows, z_rows, hidden, d_rows, masks[i], eps, scratch)
    return [dz, *(gradient.to(part.dtype) for gradient, part in zip(gradients, parts, strict=True))]


@edge_transition_streamed_backward.register_fake
def _(d_out, z, parts, mask, eps):  # type: ignore[no-untyped-def]
    return [torch.empty_like(z, memory_format=torch.contiguous_format), *(torch.empty_like(part) for part in parts)]


differentiate(edge_transition_streamed, edge_transition_streamed_backward, kernel="torch")
