"""The fused pass as custom operators: a block of rows is updated, then attended, before the next one is touched."""

import torch
from torch import Tensor

from ..common.blocking import Scratch, attended_dtype, block_dtype, row_blocks
from ..common.double_backward import no_double_backward
from ..common.pair_blocks import layer_norm_rows
from ..dtypes import TensorList, item_masks
from ..edge_transition import _rows as edge
from ..hardware.tf32 import as_remembered, remembering
from ..invariant_point_attention import _rows as ipa


def _forward(
    z: Tensor,
    parts: TensorList,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_weight: Tensor,
    mask: Tensor,
    eps: float,
    new_z: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One pass; the new rows go to `new_z`, which may be z itself: a block depends on its own rows alone."""
    dtype = block_dtype(z)
    split = edge.prepare(edge.Split(*parts), z)
    attending = ipa.Forward(q, k, v, bias_weight, mask, None, attended_dtype(z))
    scratch, masks = Scratch(z, dtype), item_masks(mask, z.shape[0])
    with torch.autocast(z.device.type, enabled=False):
        for i, rows in row_blocks(z):
            block = edge.forward_rows(split, i, rows, z[i, rows].to(dtype), masks[i], eps, scratch)
            if new_z is not None:
                new_z[i, rows] = block
            attending.block(i, rows, block.to(attended_dtype(z)))
    return attending.out, attending.pair


@torch.library.custom_op("foldkernels::edge_transition_attention_streamed", mutates_args=())
def fused_streamed(
    z: Tensor,
    parts: TensorList,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_weight: Tensor,
    mask: Tensor,
    eps: float,
    keep_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The new z (empty unless `keep_z`), the attended values and pair values; `parts` are the edge transition's."""
    new_z = torch.empty_like(z, memory_format=torch.contiguous_format) if keep_z else None
    out, pair = _forward(z, parts, q, k, v, bias_weight, mask, eps, new_z)
    return z.new_empty(0) if new_z is None else new_z, out, pair


@torch.library.custom_op("foldkernels::edge_transition_attention_streamed_", mutates_args=("z",))
def fused_streamed_(
    z: Tensor,
    parts: TensorList,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_weight: Tensor,
    mask: Tensor,
    eps: float,
    keep_z: bool,
) -> tuple[Tensor, Tensor]:
    """The same in place, without a backward pass; z is left as it is unless `keep_z`."""
    return _forward(z, parts, q, k, v, bias_weight, mask, eps, z if keep_z else None)


@fused_streamed.register_fake
def _(z, parts, q, k, v, bias_weight, mask, eps, keep_z):  # type: ignore[no-untyped-def]
    new_z = torch.empty_like(z, memory_format=torch.contiguous_format) if keep_z else z.new_empty(0)
    return new_z, *_fake_attended(z, q, v)


@fused_streamed_.register_fake
def _(z, parts, q, k, v, bias_weight, mask, eps, keep_z):  # type: ignore[no-untyped-def]
    return _fake_attended(z, q, v)


def _fake_attended(z: Tensor, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    b, h, n, _ = q.shape
    return q.new_empty(b, h, n, v.shape[-1]), q.new_empty(b, n, h, z.shape[-1])


@torch.library.custom_op("foldkernels::edge_transition_attention_streamed_backward", mutates_args=())
def fused_streamed_backward(
    d_z: Tensor | None,
    d_out: Tensor,
    d_pair: Tensor,
    z: Tensor,
    parts: TensorList,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_weight: Tensor,
    mask: Tensor,
    eps: float,
) -> TensorList:
    """The gradients of z, q, k, v and bias_weight, then of each part. The new z is computed again, block by block."""
    dtype = block_dtype(z)
    split = edge.prepare(edge.Split(*parts), z)
    gradients = edge.zero_gradients(edge.Split(*parts))
    attending = ipa.Backward(d_out, d_pair, q, k, v, bias_weight, mask, None, attended_dtype(z))
    d_old = torch.empty_like(z, memory_format=torch.contiguous_format)
    scratch, masks = Scratch(z, dtype), item_masks(mask, z.shape[0])
    with torch.autocast(z.device.type, enabled=False):
        for i, rows in row_blocks(z):
            z_rows = z[i, rows].to(dtype)
            hidden = edge.hidden_rows(split, i, rows, z_rows, scratch)
            block = layer_norm_rows(hidden.last, split.norm_weight, split.norm_bias, rows, masks[i], eps)
            d_block = attending.block_gradient(i, rows, block.to(attended_dtype(z)))
            if d_z is not None:
                d_block += d_z[i, rows]
            d_old[i, rows] = edge.backward_rows(
                split, gradients, i, rows, z_rows, hidden, d_block, masks[i], eps, scratch
            )
    dq, dk, dv, d_weight = attending.gradients()
    d_parts = (gradient.to(part.dtype) for gradient, part in zip(gradients, parts, strict=True))
    return [d_old, dq, dk, dv, d_weight.to(bias_weight.dtype), *d_parts]


@fused_streamed_backward.register_fake
def _(d_z, d_out, d_pair, z, parts, q, k, v, bias_weight, mask, eps):  # type: ignore[no-untyped-def]
    d_old = torch.empty_like(z, memory_format=torch.contiguous_format)
    return [d_old, *(torch.empty_like(x) for x in (q, k, v, bias_weight, *parts))]


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    z, parts, q, k, v, bias_weight, mask, ctx.eps, ctx.keep_z = inputs
    # Only the old z is kept, which is the pass before's new one: one z a block in all.
    ctx.save_for_backward(z, q, k, v, bias_weight, mask, *parts)


def _backward(ctx, d_z, d_out, d_pair):  # type: ignore[no-untyped-def]
    z, q, k, v, bias_weight, mask, *parts = ctx.saved_tensors
    dz, dq, dk, dv, d_weight, *d_parts = fused_streamed_backward(
        d_z if ctx.keep_z else None, d_out, d_pair, z, parts, q, k, v, bias_weight, mask, ctx.eps
    )
    return dz, d_parts, dq, dk, dv, d_weight, None, None, None


fused_streamed.register_autograd(as_remembered(_backward), setup_context=remembering(_keep))
no_double_backward(fused_streamed_backward, operation="edge_transition_attention", kernel="torch")
