"""Attention with given dropout, as custom operators: the backward computes the weights again."""

import torch
from torch import Tensor

from ..common.double_backward import no_double_backward
from ..dtypes import widest
from ..hardware.tf32 import as_remembered, remembering


def _weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax weights [b, h, n, n], in float32 at least."""
    logits = (q @ k.transpose(-1, -2)).to(widest(q)).mul_(q.shape[-1] ** -0.5)
    if mask is not None:
        # Finite: a sequence of padding alone then averages, and its rows are set to zero afterwards.
        logits.masked_fill_(~mask[:, None, None, :], -1e30)
    return torch.softmax(logits, -1)


@torch.library.custom_op("foldkernels::attention_dropped", mutates_args=())
def attention_dropped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keep: Tensor, dropout: float) -> Tensor:
    """Attend with q, k, v [b, h, n, d], dropping the weights where `keep` [b, h, n, n] is False."""
    with torch.autocast(q.device.type, enabled=False):
        weights = _weights(q, k, mask).mul_(keep).mul_(1.0 / (1.0 - dropout))
        return (weights.to(v.dtype) @ v).contiguous()


@attention_dropped.register_fake
def _(q, k, v, mask, keep, dropout):  # type: ignore[no-untyped-def]
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@torch.library.custom_op("foldkernels::attention_dropped_backward", mutates_args=())
def attention_dropped_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keep: Tensor, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    with torch.autocast(q.device.type, enabled=False):
        weights = _weights(q, k, mask)
        kept = keep.to(weights.dtype).mul_(1.0 / (1.0 - dropout))
        dv = (weights * kept).to(v.dtype).transpose(-1, -2) @ d_out
        d_weights = (d_out @ v.transpose(-1, -2)).to(weights.dtype).mul_(kept)
        d_weights -= (d_weights * weights).sum(-1, keepdim=True)
        d_logits = d_weights.mul_(weights).mul_(q.shape[-1] ** -0.5).to(q.dtype)
        return (d_logits @ k).contiguous(), (d_logits.transpose(-1, -2) @ q).contiguous(), dv.contiguous()


@attention_dropped_backward.register_fake
def _(d_out, q, k, v, mask, keep, dropout):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.dropout = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, d_out):  # type: ignore[no-untyped-def]
    return *attention_dropped_backward(d_out, *ctx.saved_tensors, ctx.dropout), None, None, None


attention_dropped.register_autograd(as_remembered(_backward), setup_context=remembering(_keep))
no_double_backward(attention_dropped_backward, operation="attention", kernel="torch")
