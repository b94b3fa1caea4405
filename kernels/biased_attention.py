"""Attention of several rows under one bias, streamed: what triangle attention and attention with a pair bias share.

Row r's queries attend to row r's keys; the bias is the same for all rows. PyTorch's fused attention takes a bias, but
no mask beside it, and on a CPU it has no gradient for the bias. So rows are taken a few at a time, the mask is laid
over the bias of those, and the backward is written out: it computes the weights again and sums the bias's gradient over
rows in float32.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from .blocks import block_dtype, pairs_per_block, slices
from .custom import no_double_backward
from .tensors import widest

_LOGITS_PER_PAIR = 128  # a block of logits may be as large as a block of pairs with their channels


class _Tile(NamedTuple):
    """How many rows and how many queries of each are attended at once."""

    rows: int
    queries: int


def _tile(q: Float[Tensor, "r h i d"], k: Float[Tensor, "r h j d"]) -> _Tile:
    logits = pairs_per_block(q) * _LOGITS_PER_PAIR
    heads, queries, keys = q.shape[1], q.shape[2], max(k.shape[2], 1)
    if heads * queries * keys <= logits:
        return _Tile(max(1, logits // (heads * max(queries, 1) * keys)), max(queries, 1))
    return _Tile(1, max(1, logits // (heads * keys)))


class _Bias:
    """The bias of a few rows: that of all rows, with the keys that a row's mask leaves out put out of reach.

    A row without keys averages, and is set to zero afterwards.
    """

    def __init__(self, bias: Float[Tensor, "h i j"], mask: Bool[Tensor, "r j"] | None) -> None:
        self.bias = bias
        self.held = _Scratch(bias)
        self.out_of_reach: Float[Tensor, "r j"] | None = None
        if mask is not None:
            # Finite, so that a row without keys is no 0 / 0; halved, so that a logit added to it does not overflow.
            self.out_of_reach = bias.new_zeros(mask.shape).masked_fill_(~mask, torch.finfo(bias.dtype).min / 2)

    def of(self, rows: slice, queries: slice) -> Float[Tensor, "#r h i j"]:
        bias = self.bias[None, :, queries]
        if self.out_of_reach is None:
            return bias
        # Added, as `where` and `masked_fill` are ten times slower with these shapes.
        of_rows = self.out_of_reach[rows, None, None, :]
        return torch.add(bias, of_rows, out=self.held(len(of_rows), *bias.shape[1:]))


class _Scratch:
    """Memory that is used again for every tile: asking the system for it would cost as much as a product."""

    def __init__(self, like: Tensor, dtype: torch.dtype | None = None) -> None:
        self.memory = like.new_empty(0, dtype=dtype)

    def __call__(self, *shape: int) -> Tensor:
        numbers = math.prod(shape)
        if self.memory.numel() < numbers:
            self.memory = self.memory.new_empty(numbers)
        return self.memory[:numbers].view(shape)


def _product(left: Float[Tensor, "r h i d"], right: Float[Tensor, "r h d j"], scratch: _Scratch) -> Tensor:
    """A batched product, in the scratch memory's type."""
    r, h, i, j = *left.shape[:3], right.shape[3]
    out = scratch(r, h, i, j)
    if out.dtype is left.dtype:
        torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out=out.view(r * h, i, j))
        return out
    return out.copy_(left @ right)


def _empty(mask: Bool[Tensor, "r j"]) -> Bool[Tensor, "r 1 1 1"]:
    """The rows without keys."""
    return ~mask.any(-1)[:, None, None, None]


def attend(
    q: Float[Tensor, "r h i d"],
    k: Float[Tensor, "r h j d"],
    v: Float[Tensor, "r h j d"],
    bias: Float[Tensor, "h i j"],
    mask: Bool[Tensor, "r j"] | None,
    out: Float[Tensor, "r h i d"],
) -> None:
    """Write the attended values of one batch item to `out`; a row without keys gets zeros."""
    dtype, tile = block_dtype(q), _tile(q, k)
    # PyTorch's own attention takes a float32 bias beside 16-bit data on a CPU only.
    biases = _Bias(bias.to(widest(q) if q.device.type == "cpu" else dtype), mask)
    for rows in slices(q.shape[0], tile.rows):
        keys, values = k[rows].to(dtype), v[rows].to(dtype)
        for some in slices(q.shape[2], tile.queries):
            queries = q[rows, :, some].to(dtype)
            over = biases.of(rows, some).expand(len(queries), -1, -1, -1)
            out[rows, :, some] = F.scaled_dot_product_attention(queries, keys, values, attn_mask=over)
    if mask is not None:
        out.masked_fill_(_empty(mask), 0.0)


def attend_backward(
    d_out: Float[Tensor, "r h i d"],
    q: Float[Tensor, "r h i d"],
    k: Float[Tensor, "r h j d"],
    v: Float[Tensor, "r h j d"],
    bias: Float[Tensor, "h i j"],
    mask: Bool[Tensor, "r j"] | None,
    d_q: Float[Tensor, "r h i d"],
    d_k: Float[Tensor, "r h j d"],
    d_v: Float[Tensor, "r h j d"],
    d_bias: Float[Tensor, "h i j"],
    out: Float[Tensor, "r h i d"] | None = None,
) -> None:
    """Write the gradients of one batch item to `d_q`, `d_k` and `d_v`; the bias's is added to `d_bias`.

    The attended values, which cost one product more here, are written to `out` if it is given.
    """
    # On a CPU the weights of 16-bit data are computed in float32: their gradient is a difference of like numbers.
    dtype = widest(q) if q.device.type == "cpu" else q.dtype
    wide, tile, scale = widest(q), _tile(q, k), q.shape[-1] ** -0.5
    biases = _Bias(bias.to(wide), mask)
    for_weights, for_gradients = _Scratch(q, wide), _Scratch(q, wide)
    for rows in slices(q.shape[0], tile.rows):
        keys, values = k[rows].to(dtype), v[rows].to(dtype)
        sum_k, sum_v = None, None
        for some in slices(q.shape[2], tile.queries):
            queries, d_some = q[rows, :, some].to(dtype), d_out[rows, :, some].to(dtype)
            if mask is not None:
                d_some = d_some.masked_fill(_empty(mask[rows]), 0.0)
            queries = queries * scale
            weights = _product(queries, keys.transpose(-1, -2), for_weights).add_(biases.of(rows, some))
            torch.softmax(weights, -1, out=weights)
            if out is not None:
                out[rows, :, some] = weights.to(dtype) @ values
            d_logits = _product(d_some, values.transpose(-1, -2), for_gradients)
            of_values = weights.to(dtype).transpose(-1, -2) @ d_some
            torch.ops.aten._softmax_backward_data(d_logits, weights, -1, wide, grad_input=d_logits)
            d_bias[:, some] += d_logits[0] if len(d_logits) == 1 else d_logits.sum(0)
            d_logits = d_logits.to(dtype)
            d_q[rows, :, some] = (d_logits @ keys).mul_(scale)
            of_keys = d_logits.transpose(-1, -2) @ queries
            sum_k = of_keys.to(wide) if sum_k is None else sum_k.add_(of_keys)
            sum_v = of_values.to(wide) if sum_v is None else sum_v.add_(of_values)
        d_k[rows], d_v[rows] = sum_k, sum_v
    if out is not None and mask is not None:
        out.masked_fill_(_empty(mask), 0.0)


def streamed(operation: str) -> Any:
    """Make the custom operator of an operation; each has its own, so that its errors name it.

    Returns:
        A function of q [b, h, r, i, d], k and v [b, h, r, j, d], bias [b, h, i, j] and mask [b, r, j] (or None) that
        gives [b, h, r, i, d], with strides like those of q.
    """

    @torch.library.custom_op(f"foldkernels::{operation}_streamed", mutates_args=())
    def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(q)
        with torch.autocast(q.device.type, enabled=False):
            for item in range(q.shape[0]):
                allowed = None if mask is None else mask[item]
                rows_first = (x[item].transpose(0, 1) for x in (q, k, v))
                attend(*rows_first, bias[item], allowed, out[item].transpose(0, 1))
        return out

    @forward.register_fake
    def _(q, k, v, bias, mask):  # type: ignore[no-untyped-def]
        return torch.empty_like(q)

    @torch.library.custom_op(f"foldkernels::{operation}_streamed_backward", mutates_args=())
    def backward(
        d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grads = [torch.empty_like(x) for x in (q, k, v)]
        d_bias = torch.zeros(bias.shape, dtype=widest(bias), device=bias.device)
        with torch.autocast(q.device.type, enabled=False):
            for item in range(q.shape[0]):
                allowed = None if mask is None else mask[item]
                given = (x[item].transpose(0, 1) for x in (d_out, q, k, v))
                asked = (x[item].transpose(0, 1) for x in grads)
                attend_backward(*given, bias[item], allowed, *asked, d_bias[item])
        return grads[0], grads[1], grads[2], d_bias.to(bias.dtype)

    @backward.register_fake
    def _(d_out, q, k, v, bias, mask):  # type: ignore[no-untyped-def]
        d_bias = torch.empty_like(bias, memory_format=torch.contiguous_format)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_bias

    def keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)

    def gradients(ctx, d_out):  # type: ignore[no-untyped-def]
        return *backward(d_out, *ctx.saved_tensors), None

    forward.register_autograd(gradients, setup_context=keep)
    no_double_backward(backward, operation=operation, kernel="torch")
    return forward
