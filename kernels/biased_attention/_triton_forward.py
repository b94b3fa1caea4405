"""Attention with a dense bias in Triton: the forward pass, and what both passes share.

Row r's queries attend to row r's keys; one bias serves all rows, as in `biased_attention`. Dao 2023 (FlashAttention-2):
the softmax runs along, so that no logit reaches memory. Logits are kept in base 2, where the exponential is one
instruction: everything that enters them is multiplied by log2(e).

Offsets are 64 bits wide: a transposed pair tensor's last row lies beyond 2^31 elements at 4,096 residues.

Strides come in units of UNIT elements. Triton sees by itself whether a stride is a multiple of 16, and of no other
number: 16-bit heads of 24 it would load number by number, and not ahead.
"""

from typing import Any

import triton
import triton.language as tl

from ..triton_tools._language import LOG2E, dot


@triton.jit
def of_row(at, item, head, row, stride_b, stride_h, stride_r, UNIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the matrix of an item, head and row begins."""
    return at + (item * stride_b + head * stride_h + row * stride_r) * UNIT


@triton.jit
def load_rows(  # type: ignore[no-untyped-def]
    at, index, stride, count, D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The rows `index` of a matrix [count, D], zeros beyond: Triton's tiles are as wide as a power of two."""
    d = tl.arange(0, WIDTH)
    there = index[:, None] < count
    if D != WIDTH:
        there = there & (d[None, :] < D)
    return tl.load(at + index[:, None].to(tl.int64) * stride * UNIT + d[None, :], mask=there, other=0.0)


@triton.jit
def load_columns(  # type: ignore[no-untyped-def]
    at, index, stride, count, D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The same rows, as columns."""
    d = tl.arange(0, WIDTH)
    there = index[None, :] < count
    if D != WIDTH:
        there = there & (d[:, None] < D)
    return tl.load(at + index[None, :].to(tl.int64) * stride * UNIT + d[:, None], mask=there, other=0.0)


@triton.jit
def store_rows(  # type: ignore[no-untyped-def]
    at, tile, index, stride, count, D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Write what `load_rows` would read."""
    d = tl.arange(0, WIDTH)
    there = index[:, None] < count
    if D != WIDTH:
        there = there & (d[None, :] < D)
    place = at + index[:, None].to(tl.int64) * stride * UNIT + d[None, :]
    tl.store(place, tile.to(at.dtype.element_ty), mask=there)


@triton.jit
def load_bias(at, i, j, stride, queries, padded_keys, UNIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of the bias [queries, padded_keys] in base 2.

    `i` and `j` are laid out by the caller, [i, j] or [j, i]. The bound on the keys is a multiple of 16: one that is not
    would cost the load its vectors, so the launcher pads the bias.
    """
    place = at + i.to(tl.int64) * stride * UNIT + j
    return tl.load(place, mask=(i < queries) & (j < padded_keys), other=0.0).to(tl.float32) * LOG2E


@triton.jit
def load_reach(at, j, keys, padded_keys, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """0 for keys that take part, -inf for the others: added to the logits.

    Floats, because a load of less than four bytes is not pipelined.
    """
    if MASKED:
        return tl.load(at + j, mask=j < padded_keys, other=float("-inf"))
    return tl.where(j < keys, 0.0, float("-inf"))


@triton.jit
def split(program, blocks, rows, heads):  # type: ignore[no-untyped-def]
    """A program's block, row, head and item.

    The blocks of a row come first, then the rows of a head: what runs at the same time shares the keys of few rows and
    the bias of one head, which stays in the L2 cache for all rows (8 MB at 2,048 residues in 16 bits).
    """
    block, rest = program % blocks, program // blocks
    row, rest = rest % rows, rest // rows
    return block, row.to(tl.int64), (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    q, k, v, bias, reach, out, lse,
    q_b, q_h, q_r, q_i,
    k_b, k_h, k_r, k_j,
    v_b, v_h, v_r, v_j,
    bias_b, bias_h, bias_i,
    out_b, out_h, out_r, out_i,
    heads, rows, queries, keys, padded_keys, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, I: tl.constexpr, J: tl.constexpr,  # noqa: E741
    UNIT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """I queries of one row and head against all its keys; out and the logits' log-sum-exp in base 2.

    Two products a logit. A query without keys gets zeros, and an lse of +inf, which makes its weights zero in the
    backward without a branch.
    """
    block, row, head, item = split(tl.program_id(0), tl.cdiv(queries, I), rows, heads)
    i, some = block * I + tl.arange(0, I), tl.arange(0, J)
    k = of_row(k, item, head, row, k_b, k_h, k_r, UNIT)
    v = of_row(v, item, head, row, v_b, v_h, v_r, UNIT)
    bias += (item * bias_b + head * bias_h) * UNIT
    reach += (item * rows + row) * padded_keys
    q_tile = load_rows(of_row(q, item, head, row, q_b, q_h, q_r, UNIT), i, q_i, queries, D, WIDTH, UNIT)
    scale *= LOG2E
    top = tl.full([I], float("-inf"), tl.float32)
    total = tl.zeros([I], tl.float32)
    sums = tl.zeros([I, WIDTH], tl.float32)
    for start in range(0, keys, J):
        j = start + some
        k_tile = load_columns(k, j, k_j, keys, D, WIDTH, UNIT)
        logits = dot(q_tile, k_tile, tl.zeros([I, J], tl.float32), PRECISION, INTERPRETED) * scale
        logits += load_bias(bias, i[:, None], j[None, :], bias_i, queries, padded_keys, UNIT)
        logits += load_reach(reach, j, keys, padded_keys, MASKED)[None, :]
        higher = tl.maximum(top, tl.max(logits, 1))
        # While no key took part the maximum is -inf, and -inf minus itself is NaN.
        origin = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - origin[:, None])
        shrink = tl.exp2(top - origin)
        total = total * shrink + tl.sum(weights, 1)
        v_tile = load_rows(v, j, v_j, keys, D, WIDTH, UNIT)
        sums = dot(weights.to(v_tile.dtype), v_tile, sums * shrink[:, None], PRECISION, INTERPRETED)
        top = higher
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out = of_row(out, item, head, row, out_b, out_h, out_r, UNIT)
    store_rows(out, sums / total[:, None], i, out_i, queries, D, WIDTH, UNIT)
    lse += ((item * heads + head) * rows + row) * queries
    tl.store(lse + i, tl.where(empty, float("inf"), top + tl.log2(total)), mask=i < queries)


#: Kernel name -> kernel; the backward's file adds its own.
KERNELS: dict[str, Any] = {"forward": forward_kernel}
