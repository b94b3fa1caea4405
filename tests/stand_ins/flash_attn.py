"""What flash-attn 2.8 documents of attention over sequences of different lengths, in plain PyTorch."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """q, k, v [total, h, d]; sequence i stands from cu_seqlens[i] to cu_seqlens[i + 1], both int32.

    What lies behind the last sequence is neither read nor written: there the output, and the gradients, are NaN here.
    """
    total, _, d = q.shape
    assert q.shape == k.shape == v.shape and d <= 256 and q.dtype is k.dtype is v.dtype is not torch.float32
    assert cu_seqlens_q.dtype is cu_seqlens_k.dtype is torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert not dropout_p and not causal and window_size == (-1, -1) and not softcap and alibi_slopes is None
    assert not return_attn_probs and block_table is None
    starts = cu_seqlens_q.tolist()
    assert starts[0] == 0 and starts[-1] <= total
    lengths = [stop - start for start, stop in pairwise(starts)]
    assert all(0 <= length <= max_seqlen_q == max_seqlen_k for length in lengths), (lengths, max_seqlen_q)
    out: Tensor = _Varlen.apply(q, k, v, starts, d**-0.5 if softmax_scale is None else softmax_scale)
    return out


class _Varlen(torch.autograd.Function):
    """Its own backward pass, so that what nobody writes can be NaN."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: list[int], scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.starts, ctx.scale = starts, scale
        return _attended(q, k, v, starts, scale)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        end = ctx.starts[-1]
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = _attended(*leaves, ctx.starts, ctx.scale)[:end]
        gradients = torch.autograd.grad(out, leaves, d_out[:end])
        return *(torch.cat([g[:end], torch.full_like(g[end:], torch.nan)]) for g in gradients), None, None


def _attended(q: Tensor, k: Tensor, v: Tensor, starts: list[int], scale: float) -> Tensor:
    parts = []
    for start, stop in pairwise(starts):
        weights = (torch.einsum("ihd,jhd->hij", q[start:stop], k[start:stop]) * scale).softmax(-1)
        parts.append(torch.einsum("hij,jhd->ihd", weights, v[start:stop]))
    return torch.cat([*parts, torch.full_like(q[starts[-1] :], torch.nan)])
