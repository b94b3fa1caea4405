"""Attention of several rows under one bias, streamed: what triangle attention and attention with a pair bias share.

Row r's queries attend to row r's keys; the bias is the same for all rows. PyTorch's fused attention takes a bias, but
no mask beside it, and on a CPU it has no gradient for the bias. So rows are taken a few at a time, the mask is laid
over the bias of those, and the backward is written out: it computes the weights again and sums the bias's gradient over
rows in float32.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..common.blocking import Scratch, block_dtype, pairs_per_block, slices
from ..common.double_backward import no_double_backward
from ..common.matmul import dot_product_attention
from ..dtypes import widest
from ..hardware.tf32 import as_remembered, remembering

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
        self.bias, self.mask, self.held = bias, mask, Scratch(bias, bias.dtype)
        self.last: tuple[Tensor, slice, Tensor] | None = None
        if mask is not None:
            # Finite, so that a row without keys is no 0 / 0; halved, so that a logit added to it does not overflow.
            self.out_of_reach = bias.new_zeros(mask.shape).masked_fill_(~mask, torch.finfo(bias.dtype).min / 2)

    def of(self, rows: slice, queries: slice) -> Float[Tensor, "#r h i j"]:
        bias = self.bias[None, :, queries]
        if self.mask is None:
            return bias
        mask = self.mask[rows]
        alone = len(mask) == 1 and mask.device.type == "cpu"  # a GPU's mask is never read
        if alone and self.last is not None and self.last[1] == queries and torch.equal(self.last[0], mask):
            return self.last[2]  # most rows of a padded batch have the same keys
        # Added, as `where` and `masked_fill` are ten times slower with these shapes.
        over = torch.add(
            bias, self.out_of_reach[rows, None, None, :], out=self.held.take("bias", len(mask), *bias.shape[1:])
        )
        self.last = (mask, queries, over) if alone else None
        return over


def _zero_without_keys(x: Float[Tensor, "r h i d"], mask: Bool[Tensor, "r j"] | None) -> None:
    """Set the rows to zero that have no keys."""
    if mask is not None:
        empty = ~mask.any(-1)
        if empty.device.type != "cpu" or bool(empty.any()):
            x.masked_fill_(empty[:, None, None, None], 0.0)


def _skipped(mask: Bool[Tensor, "r j"] | None) -> bool:
    """Whether a tile has no keys at all; on a GPU nobody knows."""
    return mask is not None and mask.device.type == "cpu" and not bool(mask.any())


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
        allowed = None if mask is None else mask[rows]
        if _skipped(allowed):
            out[rows] = 0.0
            continue
        keys, values = k[rows].to(dtype), v[rows].to(dtype)
        for some in slices(q.shape[2], tile.queries):
            queries = q[rows, :, some].to(dtype)
            over = biases.of(rows, some).expand(len(queries), -1, -1, -1)
            out[rows, :, some] = dot_product_attention(queries, keys, values, over)
        _zero_without_keys(out[rows], allowed)


def _logits(
    q: Float[Tensor, "r h i d"],
    k: Float[Tensor, "r h j d"],
    over: Float[Tensor, "#r h i j"],
    out: Float[Tensor, "r h i j"],
) -> Float[Tensor, "r h i j"]:
    """Write scaled products plus the bias, in the type of `out`."""
    scale = q.shape[-1] ** -0.5
    if len(q) == 1 and out.dtype is q.dtype:
        torch.baddbmm(over[0], q[0], k[0].transpose(-1, -2), alpha=scale, out=out[0])
        return out
    return out.copy_(q @ k.transpose(-1, -2)).mul_(scale).add_(over)


def _product(
    left: Float[Tensor, "r h i d"],
    right: Float[Tensor, "r h d j"],
    into: Float[Tensor, "r h i j"],
    scale: float = 1.0,
    *,
    add: bool = False,
) -> None:
    """Write a scaled batched product, or add it to what is there."""
    if len(left) == 1 and into.dtype is left.dtype and into.device.type != "mps":  # see `products`
        into[0].baddbmm_(left[0], right[0], beta=1.0 if add else 0.0, alpha=scale)
        return
    product = left @ right
    product = product if scale == 1.0 else product.mul_(scale)
    if add:
        into += product
    else:
        into.copy_(product)


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
    # On a CPU (and a Mac) the weights of 16-bit data are computed in float32: their gradient is a difference of like
    # numbers.
    dtype = widest(q) if q.device.type in ("cpu", "mps") else q.dtype
    wide, tile, scale = widest(q), _tile(q, k), q.shape[-1] ** -0.5
    biases = _Bias(bias.to(wide), mask)
    scratch = Scratch(q, wide)
    # Sums over several tiles of queries are not rounded to 16 bits in between.
    at_once = tile.queries >= q.shape[2] or d_k.dtype is wide
    for rows in slices(q.shape[0], tile.rows):
        allowed = None if mask is None else mask[rows]
        if _skipped(allowed):
            for x in (d_q, d_k, d_v, *(() if out is None else (out,))):
                x[rows] = 0.0
            continue
        keys, values = k[rows].to(dtype), v[rows].to(dtype)
        of_keys, of_values = (x[rows] if at_once else torch.empty_like(x[rows], dtype=wide) for x in (d_k, d_v))
        for some in slices(q.shape[2], tile.queries):
            queries, d_some, add = q[rows, :, some].to(dtype), d_out[rows, :, some].to(dtype), some.start > 0
            if allowed is not None and (len(allowed) > 1 or allowed.device.type != "cpu"):
                d_some = d_some.clone(memory_format=torch.contiguous_format)
                _zero_without_keys(d_some, allowed)
            logits = (*queries.shape[:3], keys.shape[2])
            weights = _logits(queries, keys, biases.of(rows, some), scratch.take("weights", *logits))
            torch.softmax(weights, -1, out=weights)
            narrow = weights.to(dtype)
            if out is not None:
                _product(narrow, values, out[rows, :, some])
            _product(narrow.transpose(-1, -2), d_some, of_values, add=add)
            d_logits = scratch.take("gradients", *logits)
            _product(d_some, values.transpose(-1, -2), d_logits)
            torch.ops.aten._softmax_backward_data(d_logits, weights, -1, wide, grad_input=d_logits)
            d_bias[:, some] += d_logits[0] if len(d_logits) == 1 else d_logits.sum(0)
            narrow = d_logits.to(dtype)
            _product(narrow, keys, d_q[rows, :, some], scale)
            _product(narrow.transpose(-1, -2), queries, of_keys, scale, add=add)
        if not at_once:
            d_k[rows], d_v[rows] = of_keys, of_values
        if out is not None:
            _zero_without_keys(out[rows], allowed)


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
                i, j, w, into = (x[item].transpose(0, 1) for x in (q, k, v, out))
                attend(i, j, w, bias[item], allowed, into)
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
                d, i, j, w = (x[item].transpose(0, 1) for x in (d_out, q, k, v))
                d_i, d_j, d_w = (x[item].transpose(0, 1) for x in grads)
                attend_backward(d, i, j, w, bias[item], allowed, d_i, d_j, d_w, d_bias[item])
        return grads[0], grads[1], grads[2], d_bias.to(bias.dtype)

    @backward.register_fake
    def _(d_out, q, k, v, bias, mask):  # type: ignore[no-untyped-def]
        d_bias = torch.empty_like(bias, memory_format=torch.contiguous_format)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_bias

    def keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)

    def gradients(ctx, d_out):  # type: ignore[no-untyped-def]
        return *backward(d_out, *ctx.saved_tensors), None

    forward.register_autograd(as_remembered(gradients), setup_context=remembering(keep))
    no_double_backward(backward, operation=operation, kernel="torch")
    return forward
