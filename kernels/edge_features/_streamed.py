"""The streamed core of the edge features, as custom operators: one pass over blocks of rows, forward and backward."""

import torch
from torch import Tensor

from ..common.blocking import Scratch, block_dtype, row_blocks
from ..common.double_backward import no_double_backward
from ..common.pair_blocks import zeros_like_wide
from ..dtypes import TensorList, item_masks
from ..hardware.tf32 import as_remembered, remembering
from ._rows import Geometry, Split, backward_rows, forward_rows, prepare


@torch.library.custom_op("foldkernels::edge_features_streamed", mutates_args=())
def edge_features_streamed(
    parts: TensorList,
    positions: Tensor,
    positions_sc: Tensor,
    chain: Tensor | None,
    mask: Tensor | None,
    num_bins: int,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Embed the pairs; `parts` are the fields of `Split`."""
    split = Split(*parts)
    b, n, cz = split.first_j.shape
    out = split.first_j.new_empty(b, n, n, cz, dtype=out_dtype)
    dtype = block_dtype(out)
    split = prepare(split, out)
    scratch, masks = Scratch(out, dtype), item_masks(mask, b)
    geometry = Geometry(positions, positions_sc, chain, num_bins)
    with torch.autocast(out.device.type, enabled=False):
        for i, rows in row_blocks(out):
            out[i, rows] = forward_rows(split, geometry, i, rows, masks[i], eps, scratch)
    return out


@edge_features_streamed.register_fake
def _(parts, positions, positions_sc, chain, mask, num_bins, eps, out_dtype):  # type: ignore[no-untyped-def]
    b, n, cz = Split(*parts).first_j.shape
    return parts[0].new_empty(b, n, n, cz, dtype=out_dtype)


@torch.library.custom_op("foldkernels::edge_features_streamed_backward", mutates_args=())
def edge_features_streamed_backward(
    d_out: Tensor,
    parts: TensorList,
    positions: Tensor,
    positions_sc: Tensor,
    chain: Tensor | None,
    mask: Tensor | None,
    num_bins: int,
    eps: float,
) -> TensorList:
    """The gradient of each part."""
    dtype = block_dtype(d_out)
    split = prepare(Split(*parts), d_out)
    gradients = Split(*(zeros_like_wide(part) for part in parts))
    geometry = Geometry(positions, positions_sc, chain, num_bins)
    scratch, masks = Scratch(d_out, dtype), item_masks(mask, d_out.shape[0])
    with torch.autocast(d_out.device.type, enabled=False):
        for i, rows in row_blocks(d_out):
            backward_rows(split, gradients, geometry, i, rows, d_out[i, rows].to(dtype), masks[i], eps, scratch)
    return [gradient.to(part.dtype) for gradient, part in zip(gradients, parts, strict=True)]


@edge_features_streamed_backward.register_fake
def _(d_out, parts, positions, positions_sc, chain, mask, num_bins, eps):  # type: ignore[no-untyped-def]
    return [torch.empty_like(part) for part in parts]


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    parts, positions, positions_sc, chain, mask, ctx.num_bins, ctx.eps, _ = inputs
    ctx.save_for_backward(positions, positions_sc, chain, mask, *parts)


def _backward(ctx, d_out):  # type: ignore[no-untyped-def]
    positions, positions_sc, chain, mask, *parts = ctx.saved_tensors
    d_parts = edge_features_streamed_backward(d_out, parts, positions, positions_sc, chain, mask, ctx.num_bins, ctx.eps)
    return d_parts, None, None, None, None, None, None, None


edge_features_streamed.register_autograd(as_remembered(_backward), setup_context=remembering(_keep))
no_double_backward(edge_features_streamed_backward, operation="edge_features", kernel="torch")
