"""Factorised point attention in Triton: scalars in 16 bits, points and norms in float32. Importing this imports Triton.

A logit is scale q.k + qf.kf + kb: the scalars' product on 16-bit units; that of points and of the bias's factors in
float32; and what the key alone has, its points' norms and its mask. Points come from the centroid. Values are scalars
and pair factors side by side (v), and points in float32 (vf). No product is as wide as all of them: queries and keys
are multiplied, and values summed, so many columns at a time.

No atomics: each kernel alone writes what it writes, adding in a fixed order. The backward computes the weights again in
each of its three kernels; `queries` writes dq, `keys` dk, `values` dv. Whatever lies behind an item's last residue
(`ends`) is not visited, and where nothing is written zeros are.
"""

# ruff: noqa: E741 - I and J are the numbers of queries and keys in a tile
from typing import Any

import triton
import triton.language as tl

from ..triton_tools._language import LOG2E, dot


@triton.jit
def load(at, rows, stride, count, columns, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of rows; zeros where there are none."""
    there = (rows < count)[:, None] & (columns < SIZE)[None, :]
    return tl.load(at + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=there, other=0.0)


@triton.jit
def store(at, x, rows, stride, count, columns, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    there = (rows < count)[:, None] & (columns < SIZE)[None, :]
    place = at + rows[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(place, x.to(at.dtype.element_ty), mask=there)


@triton.jit
def products(  # type: ignore[no-untyped-def]
    a, rows_a, stride_a, b, rows_b, stride_b, count, sums,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Add the inner products of rows of a and b, WIDTH of their SIZE columns at a time."""
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * WIDTH + tl.arange(0, WIDTH)
        x = load(a, rows_a, stride_a, count, columns, SIZE)
        y = load(b, rows_b, stride_b, count, columns, SIZE)
        sums = dot(x, tl.trans(y), sums, PRECISION, INTERPRETED)
    return sums


@triton.jit
def logits_of(  # type: ignore[no-untyped-def]
    q, k, qf, kf, kb, i, j, q_n, k_n, qf_n, kf_n, count, scale,
    C: tl.constexpr, CW: tl.constexpr, CHUNKS: tl.constexpr, F: tl.constexpr, FW: tl.constexpr,
    I: tl.constexpr, J: tl.constexpr,
    PRECISION: tl.constexpr, WIDE_PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Logits [I, J], in base 2; no key stands behind `count`."""
    sums = tl.zeros([I, J], tl.float32)
    sums = products(q, i, q_n, k, j, k_n, count, sums, C, CW, CHUNKS, PRECISION, INTERPRETED) * scale
    sums = products(qf, i, qf_n, kf, j, kf_n, count, sums, F, FW, 1, WIDE_PRECISION, INTERPRETED)
    sums += tl.load(kb + j, mask=j < count, other=float("-inf"))[None, :]
    return sums * LOG2E


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    q, k, v, qf, kf, kb, vf, ends, out, out_f, lse,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    qf_b, qf_n, qf_h, kf_b, kf_n, kf_h, vf_b, vf_n, vf_h,
    out_b, out_n, out_h, out_f_b, out_f_n, out_f_h,
    heads, n, first, scale,
    C: tl.constexpr, CW: tl.constexpr, CHUNKS: tl.constexpr, F: tl.constexpr, FW: tl.constexpr,
    DV: tl.constexpr, VW: tl.constexpr, VCHUNKS: tl.constexpr, PV: tl.constexpr, PW: tl.constexpr,
    I: tl.constexpr, J: tl.constexpr, POINTS: tl.constexpr,
    PRECISION: tl.constexpr, WIDE_PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """I queries of a head against all keys: VW columns of the values; with POINTS, the points and the lse too."""
    line = tl.program_id(2)
    item, head = (line // heads).to(tl.int64), (line % heads).to(tl.int64)
    count = tl.load(ends + item)
    i, some = tl.program_id(0) * I + tl.arange(0, I), tl.arange(0, J)
    columns = (first + tl.program_id(1)) * VW + tl.arange(0, VW)
    q += item * q_b + head * q_h
    k += item * k_b + head * k_h
    v += item * v_b + head * v_h
    qf += item * qf_b + head * qf_h
    kf += item * kf_b + head * kf_h
    vf += item * vf_b + head * vf_h
    kb += line.to(tl.int64) * n
    top = tl.full([I], float("-inf"), tl.float32)
    total = tl.zeros([I], tl.float32)
    sums = tl.zeros([I, VW], tl.float32)
    of_points = tl.zeros([I, PW], tl.float32)
    # A block behind the item's end has nothing to ask.
    last = tl.where(tl.program_id(0) * I < count, count, 0)
    for start in range(0, last, J):
        j = start + some
        logits = logits_of(
            q, k, qf, kf, kb, i, j, q_n, k_n, qf_n, kf_n, count, scale,
            C, CW, CHUNKS, F, FW, I, J, PRECISION, WIDE_PRECISION, INTERPRETED,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        v_tile = load(v, j, v_n, count, columns, DV)
        sums = dot(weights.to(v_tile.dtype), v_tile, sums * shrink[:, None], PRECISION, INTERPRETED)
        if POINTS:
            vf_tile = load(vf, j, vf_n, count, tl.arange(0, PW), PV)
            of_points = dot(weights, vf_tile, of_points * shrink[:, None], WIDE_PRECISION, INTERPRETED)
        top = higher
    # Nothing was added up behind the end.
    total = tl.where(total == 0.0, 1.0, total)
    store(out + item * out_b + head * out_h, sums / total[:, None], i, out_n, n, columns, DV)
    if POINTS:
        at = out_f + item * out_f_b + head * out_f_h
        store(at, of_points / total[:, None], i, out_f_n, n, tl.arange(0, PW), PV)
        tl.store(lse + line.to(tl.int64) * n + i, top + tl.log2(total), mask=i < n)


@triton.jit
def d_logits_of(  # type: ignore[no-untyped-def]
    logits, d_out, v, d_points, vf, lse, delta, i, j, d_out_n, v_n, d_points_n, vf_n, count,
    DV: tl.constexpr, VW: tl.constexpr, VCHUNKS: tl.constexpr, PV: tl.constexpr, PW: tl.constexpr,
    I: tl.constexpr, J: tl.constexpr,
    PRECISION: tl.constexpr, WIDE_PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits, from what the values are asked for."""
    of_lse = tl.load(lse + i, mask=i < count, other=float("inf"))  # behind the end: no weight
    of_delta = tl.load(delta + i, mask=i < count, other=0.0)
    asked = tl.zeros([I, J], tl.float32)
    asked = products(d_out, i, d_out_n, v, j, v_n, count, asked, DV, VW, VCHUNKS, PRECISION, INTERPRETED)
    asked = products(d_points, i, d_points_n, vf, j, vf_n, count, asked, PV, PW, 1, WIDE_PRECISION, INTERPRETED)
    return tl.exp2(logits - of_lse[:, None]) * (asked - of_delta[:, None])


@triton.jit
def queries_kernel(  # type: ignore[no-untyped-def]
    d_out, d_points, q, k, v, qf, kf, kb, vf, ends, lse, delta, d_q, d_qf,
    d_out_b, d_out_n, d_out_h, d_points_b, d_points_n, d_points_h,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    qf_b, qf_n, qf_h, kf_b, kf_n, kf_h, vf_b, vf_n, vf_h,
    d_q_b, d_q_n, d_q_h, d_qf_b, d_qf_n, d_qf_h,
    heads, n, first, scale,
    C: tl.constexpr, CW: tl.constexpr, CHUNKS: tl.constexpr, F: tl.constexpr, FW: tl.constexpr,
    DV: tl.constexpr, VW: tl.constexpr, VCHUNKS: tl.constexpr, PV: tl.constexpr, PW: tl.constexpr,
    I: tl.constexpr, J: tl.constexpr, POINTS: tl.constexpr,
    PRECISION: tl.constexpr, WIDE_PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write CW columns of dq of I queries; with POINTS, that of their float32 columns."""
    line = tl.program_id(2)
    item, head = (line // heads).to(tl.int64), (line % heads).to(tl.int64)
    count = tl.load(ends + item)
    i, some = tl.program_id(0) * I + tl.arange(0, I), tl.arange(0, J)
    columns = (first + tl.program_id(1)) * CW + tl.arange(0, CW)
    features = tl.arange(0, FW)
    d_out += item * d_out_b + head * d_out_h
    d_points += item * d_points_b + head * d_points_h
    q += item * q_b + head * q_h
    k += item * k_b + head * k_h
    v += item * v_b + head * v_h
    qf += item * qf_b + head * qf_h
    kf += item * kf_b + head * kf_h
    vf += item * vf_b + head * vf_h
    kb += line.to(tl.int64) * n
    lse += line.to(tl.int64) * n
    delta += line.to(tl.int64) * n
    sums = tl.zeros([I, CW], tl.float32)
    of_features = tl.zeros([I, FW], tl.float32)
    last = tl.where(tl.program_id(0) * I < count, count, 0)
    for start in range(0, last, J):
        j = start + some
        logits = logits_of(
            q, k, qf, kf, kb, i, j, q_n, k_n, qf_n, kf_n, count, scale,
            C, CW, CHUNKS, F, FW, I, J, PRECISION, WIDE_PRECISION, INTERPRETED,
        )  # fmt: skip
        d_logits = d_logits_of(
            logits, d_out, v, d_points, vf, lse, delta, i, j, d_out_n, v_n, d_points_n, vf_n, count,
            DV, VW, VCHUNKS, PV, PW, I, J, PRECISION, WIDE_PRECISION, INTERPRETED,
        )  # fmt: skip
        k_tile = load(k, j, k_n, count, columns, C)
        sums = dot(d_logits.to(k_tile.dtype), k_tile, sums, PRECISION, INTERPRETED)
        if POINTS:
            kf_tile = load(kf, j, kf_n, count, features, F)
            of_features = dot(d_logits, kf_tile, of_features, WIDE_PRECISION, INTERPRETED)
    store(d_q + item * d_q_b + head * d_q_h, sums * scale, i, d_q_n, n, columns, C)
    if POINTS:
        store(d_qf + item * d_qf_b + head * d_qf_h, of_features, i, d_qf_n, n, features, F)


@triton.jit
def keys_kernel(  # type: ignore[no-untyped-def]
    d_out, d_points, q, k, v, qf, kf, kb, vf, ends, lse, delta, d_k, d_kf, d_kb,
    d_out_b, d_out_n, d_out_h, d_points_b, d_points_n, d_points_h,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    qf_b, qf_n, qf_h, kf_b, kf_n, kf_h, vf_b, vf_n, vf_h,
    d_k_b, d_k_n, d_k_h, d_kf_b, d_kf_n, d_kf_h,
    heads, n, first, scale,
    C: tl.constexpr, CW: tl.constexpr, CHUNKS: tl.constexpr, F: tl.constexpr, FW: tl.constexpr,
    DV: tl.constexpr, VW: tl.constexpr, VCHUNKS: tl.constexpr, PV: tl.constexpr, PW: tl.constexpr,
    I: tl.constexpr, J: tl.constexpr, POINTS: tl.constexpr,
    PRECISION: tl.constexpr, WIDE_PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write CW columns of dk of J keys; with POINTS, that of their float32 columns and of what they alone have."""
    line = tl.program_id(2)
    item, head = (line // heads).to(tl.int64), (line % heads).to(tl.int64)
    count = tl.load(ends + item)
    j, some = tl.program_id(0) * J + tl.arange(0, J), tl.arange(0, I)
    columns = (first + tl.program_id(1)) * CW + tl.arange(0, CW)
    features = tl.arange(0, FW)
    d_out += item * d_out_b + head * d_out_h
    d_points += item * d_points_b + head * d_points_h
    q += item * q_b + head * q_h
    k += item * k_b + head * k_h
    v += item * v_b + head * v_h
    qf += item * qf_b + head * qf_h
    kf += item * kf_b + head * kf_h
    vf += item * vf_b + head * vf_h
    kb += line.to(tl.int64) * n
    lse += line.to(tl.int64) * n
    delta += line.to(tl.int64) * n
    sums = tl.zeros([J, CW], tl.float32)
    of_features = tl.zeros([J, FW], tl.float32)
    of_keys = tl.zeros([J], tl.float32)
    last = tl.where(tl.program_id(0) * J < count, count, 0)
    for start in range(0, last, I):
        i = start + some
        logits = logits_of(
            q, k, qf, kf, kb, i, j, q_n, k_n, qf_n, kf_n, count, scale,
            C, CW, CHUNKS, F, FW, I, J, PRECISION, WIDE_PRECISION, INTERPRETED,
        )  # fmt: skip
        d_logits = d_logits_of(
            logits, d_out, v, d_points, vf, lse, delta, i, j, d_out_n, v_n, d_points_n, vf_n, count,
            DV, VW, VCHUNKS, PV, PW, I, J, PRECISION, WIDE_PRECISION, INTERPRETED,
        )  # fmt: skip
        q_tile = load(q, i, q_n, count, columns, C)
        sums = dot(tl.trans(d_logits.to(q_tile.dtype)), q_tile, sums, PRECISION, INTERPRETED)
        if POINTS:
            qf_tile = load(qf, i, qf_n, count, features, F)
            of_features = dot(tl.trans(d_logits), qf_tile, of_features, WIDE_PRECISION, INTERPRETED)
            of_keys += tl.sum(d_logits, 0)
    store(d_k + item * d_k_b + head * d_k_h, sums * scale, j, d_k_n, n, columns, C)
    if POINTS:
        store(d_kf + item * d_kf_b + head * d_kf_h, of_features, j, d_kf_n, n, features, F)
        tl.store(d_kb + line.to(tl.int64) * n + j, of_keys, mask=j < n)


@triton.jit
def values_kernel(  # type: ignore[no-untyped-def]
    d_out, d_points, q, k, qf, kf, kb, ends, lse, d_v, d_vf,
    d_out_b, d_out_n, d_out_h, d_points_b, d_points_n, d_points_h,
    q_b, q_n, q_h, k_b, k_n, k_h, qf_b, qf_n, qf_h, kf_b, kf_n, kf_h,
    d_v_b, d_v_n, d_v_h, d_vf_b, d_vf_n, d_vf_h,
    heads, n, first, scale,
    C: tl.constexpr, CW: tl.constexpr, CHUNKS: tl.constexpr, F: tl.constexpr, FW: tl.constexpr,
    DV: tl.constexpr, VW: tl.constexpr, VCHUNKS: tl.constexpr, PV: tl.constexpr, PW: tl.constexpr,
    I: tl.constexpr, J: tl.constexpr, POINTS: tl.constexpr,
    PRECISION: tl.constexpr, WIDE_PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write VW columns of dv of J keys; with POINTS, that of their points."""
    line = tl.program_id(2)
    item, head = (line // heads).to(tl.int64), (line % heads).to(tl.int64)
    count = tl.load(ends + item)
    j, some = tl.program_id(0) * J + tl.arange(0, J), tl.arange(0, I)
    columns = (first + tl.program_id(1)) * VW + tl.arange(0, VW)
    points = tl.arange(0, PW)
    d_out += item * d_out_b + head * d_out_h
    d_points += item * d_points_b + head * d_points_h
    q += item * q_b + head * q_h
    k += item * k_b + head * k_h
    qf += item * qf_b + head * qf_h
    kf += item * kf_b + head * kf_h
    kb += line.to(tl.int64) * n
    lse += line.to(tl.int64) * n
    sums = tl.zeros([J, VW], tl.float32)
    of_points = tl.zeros([J, PW], tl.float32)
    last = tl.where(tl.program_id(0) * J < count, count, 0)
    for start in range(0, last, I):
        i = start + some
        logits = logits_of(
            q, k, qf, kf, kb, i, j, q_n, k_n, qf_n, kf_n, count, scale,
            C, CW, CHUNKS, F, FW, I, J, PRECISION, WIDE_PRECISION, INTERPRETED,
        )  # fmt: skip
        of_lse = tl.load(lse + i, mask=i < count, other=float("inf"))
        weights = tl.trans(tl.exp2(logits - of_lse[:, None]))
        do_tile = load(d_out, i, d_out_n, count, columns, DV)
        sums = dot(weights.to(do_tile.dtype), do_tile, sums, PRECISION, INTERPRETED)
        if POINTS:
            dp_tile = load(d_points, i, d_points_n, count, points, PV)
            of_points = dot(weights, dp_tile, of_points, WIDE_PRECISION, INTERPRETED)
    store(d_v + item * d_v_b + head * d_v_h, sums, j, d_v_n, n, columns, DV)
    if POINTS:
        store(d_vf + item * d_vf_b + head * d_vf_h, of_points, j, d_vf_n, n, points, PV)


#: Kernel name -> kernel.
KERNELS: dict[str, Any] = {
    "forward": forward_kernel,
    "queries": queries_kernel,
    "keys": keys_kernel,
    "values": values_kernel,
}
