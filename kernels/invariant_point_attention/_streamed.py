"""The streamed core of invariant point attention, as custom operators: z is read block by block, forward and backward.

A loop over row blocks would make Dynamo compile one graph per length, so both directions are opaque operators. The
backward computes the attention again instead of keeping it: nothing of size n x n outlives a block but z's gradient.
"""

from math import sqrt

import torch
from torch import Tensor

from ..blocks import block_dtype, row_blocks
from ..custom import no_double_backward
from ._rows import attention_rows, backward_pair_rows, backward_rows, forward_rows


@torch.library.custom_op("foldkernels::ipa_streamed", mutates_args=())
def ipa_streamed(
    q: Tensor, k: Tensor, v: Tensor, z: Tensor, bias_weight: Tensor, there: Tensor, pair_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend with lifted q, k [b, h, n, d] and v [b, h, n, dv]; `there` [b, n] is False for queries that get zeros."""
    b, h, n, _ = q.shape
    dtype = block_dtype(z)
    out, pair = q.new_empty(b, h, n, v.shape[-1]), q.new_empty(b, n, h, z.shape[-1])
    k_transposed = k.transpose(2, 3).contiguous()
    weight = (sqrt(1 / 3) * bias_weight).to(dtype).t().contiguous()
    with torch.autocast(q.device.type, enabled=False):
        for i, rows in row_blocks(z):
            z_rows = z[i, rows].to(dtype)
            allowed = None if pair_mask is None else pair_mask[i, rows]
            attention = attention_rows(q[i, :, rows], k_transposed[i], z_rows, weight, allowed)
            forward_rows(attention, v[i], z_rows, there[i, rows], out[i, :, rows], pair[i, rows])
    return out, pair


@ipa_streamed.register_fake
def _(q, k, v, z, bias_weight, there, pair_mask):  # type: ignore[no-untyped-def]
    b, h, n, _ = q.shape
    return q.new_empty(b, h, n, v.shape[-1]), q.new_empty(b, n, h, z.shape[-1])


@torch.library.custom_op("foldkernels::ipa_streamed_backward", mutates_args=())
def ipa_streamed_backward(
    d_out: Tensor,
    d_pair: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    bias_weight: Tensor,
    there: Tensor,
    pair_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, z and bias_weight."""
    dtype = block_dtype(z)
    # A query that is not there passes no gradient, whatever arrives at its zeros.
    d_out = d_out.masked_fill(~there[:, None, :, None], 0.0)
    d_pair = d_pair.masked_fill(~there[:, :, None, None], 0.0)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    d_weight = torch.zeros_like(bias_weight, dtype=q.dtype)
    k_transposed, v_transposed = k.transpose(2, 3).contiguous(), v.transpose(2, 3).contiguous()
    scaled = sqrt(1 / 3) * bias_weight.to(q.dtype)
    weight = scaled.to(dtype).t().contiguous()
    with torch.autocast(q.device.type, enabled=False):
        for i, rows in row_blocks(z):
            z_rows = z[i, rows].to(dtype)
            allowed = None if pair_mask is None else pair_mask[i, rows]
            attention = attention_rows(q[i, :, rows], k_transposed[i], z_rows, weight, allowed)
            d_logits = backward_rows(attention, d_out[i, :, rows], d_pair[i, rows], v_transposed[i], z_rows)
            dq[i, :, rows] = torch.bmm(d_logits, k[i])
            dk[i].baddbmm_(d_logits.transpose(1, 2), q[i, :, rows])
            dv[i].baddbmm_(attention.transpose(1, 2), d_out[i, :, rows])
            d_weight += torch.bmm(d_logits.transpose(0, 1).to(dtype), z_rows).sum(0, dtype=q.dtype)
            dz[i, rows] = backward_pair_rows(attention, d_logits, d_pair[i, rows], scaled, dtype)
    return dq, dk, dv, dz, (sqrt(1 / 3) * d_weight).to(bias_weight.dtype)


@ipa_streamed_backward.register_fake
def _(d_out, d_pair, q, k, v, z, bias_weight, there, pair_mask):  # type: ignore[no-untyped-def]
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dz, torch.empty_like(bias_weight)


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_out, d_pair):  # type: ignore[no-untyped-def]
    return *ipa_streamed_backward(d_out.contiguous(), d_pair.contiguous(), *ctx.saved_tensors), None, None


ipa_streamed.register_autograd(_backward, setup_context=_keep)
no_double_backward(ipa_streamed_backward, operation="invariant_point_attention", kernel="torch")
