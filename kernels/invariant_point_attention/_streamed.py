"""The streamed core of invariant point attention, as custom operators: z is read block by block, forward and backward.

A loop over row blocks would make Dynamo compile one graph per length, so both directions are opaque operators. The
backward computes the attention again instead of keeping it: nothing of size n x n outlives a block but z's gradient.
"""

import torch
from torch import Tensor

from ..common.blocking import attended_dtype, row_blocks
from ..common.double_backward import no_double_backward
from ..hardware.tf32 import as_remembered, remembering
from ._rows import Backward, Forward


@torch.library.custom_op("foldkernels::ipa_streamed", mutates_args=())
def ipa_streamed(
    q: Tensor, k: Tensor, v: Tensor, z: Tensor, bias_weight: Tensor, there: Tensor, pair_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend with lifted q, k [b, h, n, d] and v [b, h, n, dv]; `there` [b, n] is False for queries that get zeros."""
    dtype = attended_dtype(z)
    attending = Forward(q, k, v, bias_weight, there, pair_mask, dtype)
    with torch.autocast(q.device.type, enabled=False):
        for i, rows in row_blocks(z):
            attending.block(i, rows, z[i, rows].to(dtype))
    return attending.out, attending.pair


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
    dtype = attended_dtype(z)
    backward = Backward(d_out, d_pair, q, k, v, bias_weight, there, pair_mask, dtype)
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    with torch.autocast(q.device.type, enabled=False):
        for i, rows in row_blocks(z):
            dz[i, rows] = backward.block_gradient(i, rows, z[i, rows].to(dtype))
    dq, dk, dv, d_weight = backward.gradients()
    return dq, dk, dv, dz, d_weight.to(bias_weight.dtype)


@ipa_streamed_backward.register_fake
def _(d_out, d_pair, q, k, v, z, bias_weight, there, pair_mask):  # type: ignore[no-untyped-def]
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dz, torch.empty_like(bias_weight)


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_out, d_pair):  # type: ignore[no-untyped-def]
    return *ipa_streamed_backward(d_out.contiguous(), d_pair.contiguous(), *ctx.saved_tensors), None, None


ipa_streamed.register_autograd(as_remembered(_backward), setup_context=remembering(_keep))
no_double_backward(ipa_streamed_backward, operation="invariant_point_attention", kernel="torch")
