"""Attention with a dense bias in Triton: the backward pass, without atomics.

Three kernels, each the only writer of what it writes, and each adding in a fixed order: every run gives the same bits.

* `queries_kernel`: a program holds queries, runs over keys, and writes dq (3 products a logit);
* `keys_kernel`: a program holds keys, runs over queries, and writes dk and dv (4 products);
* `bias_kernel`: a program holds a tile of the bias, runs over the rows that share it, and writes the sum (2 products).

So 9 products a logit, where kernels that add to dq and to the bias with atomics do 5. Keeping a bias tile's sum in
memory while `keys_kernel` runs over rows would save 2 of them, but read and write 8 bytes a logit. Computing them again
reads 4 in a tile of 64 x 64 at a head size of 32; the two products, 128 flop, cost 0.16 ps on an H200 (790 TFLOP/s),
where the L2 cache takes 1.5 ps for 8 bytes (about 5.5 TB/s). All this is arithmetic, not measured.

Where one row alone uses the bias, as in attention with a pair bias, `queries_kernel` writes the bias's gradient on its
way, and the third is not run.
"""

# ruff: noqa: E741 - I and J are the numbers of queries and keys in a tile
import triton
import triton.language as tl

from ..triton_tools._language import LOG2E, dot
from ._triton_forward import KERNELS, load_bias, load_columns, load_reach, load_rows, of_row, split, store_rows


@triton.jit
def queries_kernel(  # type: ignore[no-untyped-def]
    d_out, q, k, v, bias, reach, out, lse, delta, d_q, d_bias,
    d_out_b, d_out_h, d_out_r, d_out_i,
    q_b, q_h, q_r, q_i,
    k_b, k_h, k_r, k_j,
    v_b, v_h, v_r, v_j,
    bias_b, bias_h, bias_i,
    out_b, out_h, out_r, out_i,
    d_q_b, d_q_h, d_q_r, d_q_i,
    heads, rows, queries, keys, padded_keys, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, I: tl.constexpr, J: tl.constexpr,
    UNIT: tl.constexpr, MASKED: tl.constexpr, WITH_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write dq of I queries, their out . d_out for the kernels that follow, and d_bias if only one row uses it."""
    block, row, head, item = split(tl.program_id(0), tl.cdiv(queries, I), rows, heads)
    i, some = block * I + tl.arange(0, I), tl.arange(0, J)
    k = of_row(k, item, head, row, k_b, k_h, k_r, UNIT)
    v = of_row(v, item, head, row, v_b, v_h, v_r, UNIT)
    bias += (item * bias_b + head * bias_h) * UNIT
    reach += (item * rows + row) * padded_keys
    line = ((item * heads + head) * rows + row) * queries
    q = of_row(q, item, head, row, q_b, q_h, q_r, UNIT)
    q_tile = load_rows(q, i, q_i, queries, D, WIDTH, UNIT)
    d_out = of_row(d_out, item, head, row, d_out_b, d_out_h, d_out_r, UNIT)
    do_tile = load_rows(d_out, i, d_out_i, queries, D, WIDTH, UNIT)
    out = of_row(out, item, head, row, out_b, out_h, out_r, UNIT)
    out_tile = load_rows(out, i, out_i, queries, D, WIDTH, UNIT)
    of_lse = tl.load(lse + line + i, mask=i < queries, other=float("inf"))
    of_delta = tl.sum(out_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    tl.store(delta + line + i, of_delta, mask=i < queries)
    sums = tl.zeros([I, WIDTH], tl.float32)
    for start in range(0, keys, J):
        j = start + some
        k_tile = load_rows(k, j, k_j, keys, D, WIDTH, UNIT)
        v_tile = load_rows(v, j, v_j, keys, D, WIDTH, UNIT)
        nothing = tl.zeros([I, J], tl.float32)
        logits = dot(q_tile, tl.trans(k_tile), nothing, PRECISION, INTERPRETED) * (scale * LOG2E)
        logits += load_bias(bias, i[:, None], j[None, :], bias_i, queries, padded_keys, UNIT)
        logits += load_reach(reach, j, keys, padded_keys, MASKED)[None, :]
        weights = tl.exp2(logits - of_lse[:, None])
        d_weights = dot(do_tile, tl.trans(v_tile), nothing, PRECISION, INTERPRETED)
        d_logits = weights * (d_weights - of_delta[:, None])
        if WITH_BIAS:
            place = d_bias + ((item * heads + head) * queries + i[:, None]) * padded_keys + j[None, :]
            there = (i[:, None] < queries) & (j[None, :] < padded_keys)
            tl.store(place, d_logits.to(d_bias.dtype.element_ty), mask=there)
        sums = dot(d_logits.to(k_tile.dtype), k_tile, sums, PRECISION, INTERPRETED)
    d_q = of_row(d_q, item, head, row, d_q_b, d_q_h, d_q_r, UNIT)
    store_rows(d_q, sums * scale, i, d_q_i, queries, D, WIDTH, UNIT)


@triton.jit
def keys_kernel(  # type: ignore[no-untyped-def]
    d_out, q, k, v, bias, reach, lse, delta, d_k, d_v,
    d_out_b, d_out_h, d_out_r, d_out_i,
    q_b, q_h, q_r, q_i,
    k_b, k_h, k_r, k_j,
    v_b, v_h, v_r, v_j,
    bias_b, bias_h, bias_i,
    d_k_b, d_k_h, d_k_r, d_k_j,
    d_v_b, d_v_h, d_v_r, d_v_j,
    heads, rows, queries, keys, padded_keys, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, I: tl.constexpr, J: tl.constexpr,
    UNIT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of J keys.

    Logits lie with the keys first, so that weights and gradients are left operands as they are.
    """
    block, row, head, item = split(tl.program_id(0), tl.cdiv(keys, J), rows, heads)
    j, some = block * J + tl.arange(0, J), tl.arange(0, I)
    q = of_row(q, item, head, row, q_b, q_h, q_r, UNIT)
    d_out = of_row(d_out, item, head, row, d_out_b, d_out_h, d_out_r, UNIT)
    bias += (item * bias_b + head * bias_h) * UNIT
    line = ((item * heads + head) * rows + row) * queries
    k = of_row(k, item, head, row, k_b, k_h, k_r, UNIT)
    k_tile = load_rows(k, j, k_j, keys, D, WIDTH, UNIT)
    v = of_row(v, item, head, row, v_b, v_h, v_r, UNIT)
    v_tile = load_rows(v, j, v_j, keys, D, WIDTH, UNIT)
    reach_tile = load_reach(reach + (item * rows + row) * padded_keys, j, keys, padded_keys, MASKED)
    of_keys = tl.zeros([J, WIDTH], tl.float32)
    of_values = tl.zeros([J, WIDTH], tl.float32)
    for start in range(0, queries, I):
        i = start + some
        q_tile = load_rows(q, i, q_i, queries, D, WIDTH, UNIT)
        do_tile = load_rows(d_out, i, d_out_i, queries, D, WIDTH, UNIT)
        of_lse = tl.load(lse + line + i, mask=i < queries, other=float("inf"))  # beyond: no weight
        of_delta = tl.load(delta + line + i, mask=i < queries, other=0.0)
        nothing = tl.zeros([J, I], tl.float32)
        logits = dot(k_tile, tl.trans(q_tile), nothing, PRECISION, INTERPRETED) * (scale * LOG2E)
        logits += load_bias(bias, i[None, :], j[:, None], bias_i, queries, padded_keys, UNIT)
        logits += reach_tile[:, None]
        weights = tl.exp2(logits - of_lse[None, :])
        of_values = dot(weights.to(do_tile.dtype), do_tile, of_values, PRECISION, INTERPRETED)
        d_weights = dot(v_tile, tl.trans(do_tile), nothing, PRECISION, INTERPRETED)
        d_logits = weights * (d_weights - of_delta[None, :])
        of_keys = dot(d_logits.to(q_tile.dtype), q_tile, of_keys, PRECISION, INTERPRETED)
    d_k = of_row(d_k, item, head, row, d_k_b, d_k_h, d_k_r, UNIT)
    store_rows(d_k, of_keys * scale, j, d_k_j, keys, D, WIDTH, UNIT)
    d_v = of_row(d_v, item, head, row, d_v_b, d_v_h, d_v_r, UNIT)
    store_rows(d_v, of_values, j, d_v_j, keys, D, WIDTH, UNIT)


@triton.jit
def bias_kernel(  # type: ignore[no-untyped-def]
    d_out, q, k, v, bias, reach, lse, delta, d_bias,
    d_out_b, d_out_h, d_out_r, d_out_i,
    q_b, q_h, q_r, q_i,
    k_b, k_h, k_r, k_j,
    v_b, v_h, v_r, v_j,
    bias_b, bias_h, bias_i,
    items, heads, rows, queries, keys, padded_keys, some_rows, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, I: tl.constexpr, J: tl.constexpr,
    UNIT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile [I, J] of the bias, summed over `some_rows` rows, to d_bias [parts, b, h, i, p]."""
    i_blocks, j_blocks = tl.cdiv(queries, I), tl.cdiv(keys, J)
    block, head, item, part = split(tl.program_id(0), i_blocks * j_blocks, heads, items)
    i = (block // j_blocks) * I + tl.arange(0, I)
    j = (block % j_blocks) * J + tl.arange(0, J)
    first = part * some_rows
    last = tl.minimum(first + some_rows, rows)
    lse += (item * heads + head) * rows * queries
    delta += (item * heads + head) * rows * queries
    reach += item * rows * padded_keys
    bias += (item * bias_b + head * bias_h) * UNIT
    bias_tile = load_bias(bias, i[:, None], j[None, :], bias_i, queries, padded_keys, UNIT)
    sums = tl.zeros([I, J], tl.float32)
    for row in range(first, last):
        q_row = of_row(q, item, head, row, q_b, q_h, q_r, UNIT)
        q_tile = load_rows(q_row, i, q_i, queries, D, WIDTH, UNIT)
        k_row = of_row(k, item, head, row, k_b, k_h, k_r, UNIT)
        k_tile = load_columns(k_row, j, k_j, keys, D, WIDTH, UNIT)
        d_out_row = of_row(d_out, item, head, row, d_out_b, d_out_h, d_out_r, UNIT)
        do_tile = load_rows(d_out_row, i, d_out_i, queries, D, WIDTH, UNIT)
        v_row = of_row(v, item, head, row, v_b, v_h, v_r, UNIT)
        v_tile = load_columns(v_row, j, v_j, keys, D, WIDTH, UNIT)
        of_lse = tl.load(lse + row * queries + i, mask=i < queries, other=float("inf"))
        of_delta = tl.load(delta + row * queries + i, mask=i < queries, other=0.0)
        nothing = tl.zeros([I, J], tl.float32)
        logits = dot(q_tile, k_tile, nothing, PRECISION, INTERPRETED) * (scale * LOG2E) + bias_tile
        logits += load_reach(reach + row * padded_keys, j, keys, padded_keys, MASKED)[None, :]
        d_weights = dot(do_tile, v_tile, nothing, PRECISION, INTERPRETED)
        sums += tl.exp2(logits - of_lse[:, None]) * (d_weights - of_delta[:, None])
    d_bias += ((part * items + item) * heads + head) * queries * padded_keys
    place = d_bias + i[:, None].to(tl.int64) * padded_keys + j[None, :]
    there = (i[:, None] < queries) & (j[None, :] < padded_keys)
    tl.store(place, sums.to(d_bias.dtype.element_ty), mask=there)


KERNELS |= {"queries": queries_kernel, "keys": keys_kernel, "bias": bias_kernel}
