"""Invariant point attention in Triton: the two kernels. Importing this imports Triton.

A program takes a block of query rows and all heads, so that each tile of z is loaded once: its product with the bias
weight gives the logits' bias, its product with the attention weights the mean of z. Projecting that mean is the
module's, after the kernel. The softmax runs along (Dao 2023, FlashAttention-2), in base 2, where the exponential is one
instruction.

The scalar and point part of the logits, an inner product of lifted vectors (`_rows.lift`), comes in one of two ways,
which `FUSED` tells apart: computed here from queries and keys, or read from memory, where a product of matrices put it.
The second serves heads too wide for the first.

Tiles of logits are laid out [queries, keys, heads], as the product with z leaves them. Triton's tiles are as wide as a
power of two: heads and channels beyond the real ones are zeros that are not read. Where z is wide its channels come in
two chunks, because a product's operands stand in registers. Offsets are 64 bits wide.
"""

# ruff: noqa: E741 - I and J are the numbers of queries and keys in a tile
from typing import Any

import triton
import triton.language as tl

from ..triton_tools._language import LOG2E, dot

#: The pair bias's share of the logits: w_L = sqrt(1/3).
SHARE = tl.constexpr(0.5773502691896258)


@triton.jit
def load_pairs(  # type: ignore[no-untyped-def]
    at, i, j, stride_i, stride_j, n, CZ: tl.constexpr, CZW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A tile [i, j, channels] of z, of a chunk of its channels."""
    c = CHUNK * CZW + tl.arange(0, CZW)
    there = (i[:, None, None] < n) & (j[None, :, None] < n)
    if CZ < (CHUNK + 1) * CZW:
        there = there & (c[None, None, :] < CZ)
    rows = i[:, None, None].to(tl.int64) * stride_i
    return tl.load(at + rows + j[None, :, None].to(tl.int64) * stride_j + c[None, None, :], mask=there, other=0.0)


@triton.jit
def store_pairs(  # type: ignore[no-untyped-def]
    at, tile, i, j, n, CZ: tl.constexpr, CZW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write a tile [i, j, channels] of z's gradient [n, n, CZ]."""
    c = CHUNK * CZW + tl.arange(0, CZW)
    there = (i[:, None, None] < n) & (j[None, :, None] < n)
    if CZ < (CHUNK + 1) * CZW:
        there = there & (c[None, None, :] < CZ)
    place = at + (i[:, None, None].to(tl.int64) * n + j[None, :, None]) * CZ + c[None, None, :]
    tl.store(place, tile.to(at.dtype.element_ty), mask=there)


@triton.jit
def load_weight(  # type: ignore[no-untyped-def]
    at, i, h, CZ: tl.constexpr, CZW: tl.constexpr, HW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The bias weight of a chunk, [i, channels, heads], the same for every row.

    A product of matrices with two axes would need z in another shape, and Triton then loads no tile ahead.
    """
    c = CHUNK * CZW + tl.arange(0, CZW)
    place = at + i[:, None, None] * 0 + c[None, :, None] * HW + h[None, None, :]
    return tl.load(place, mask=(c[None, :, None] < CZ) & (i[:, None, None] >= 0), other=0.0)


@triton.jit
def load_joined(  # type: ignore[no-untyped-def]
    at, i, n, CZ: tl.constexpr, CZW: tl.constexpr, HW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """For each row, a chunk of the bias weight and the gradient of the mean of z: [i, 2 HW, channels]."""
    c, both = CHUNK * CZW + tl.arange(0, CZW), tl.arange(0, 2 * HW)
    place = at + (i[:, None, None].to(tl.int64) * (2 * HW) + both[None, :, None]) * CZ + c[None, None, :]
    return tl.load(place, mask=(i[:, None, None] < n) & (c[None, None, :] < CZ), other=0.0)


@triton.jit
def load_heads(  # type: ignore[no-untyped-def]
    at, h, x, term, count, H: tl.constexpr, D: tl.constexpr, DW: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """One term of residues x, all heads: [heads, x, columns] of [heads, count, TERMS, D]."""
    d = tl.arange(0, DW)
    there = (h[:, None, None] < H) & (x[None, :, None] < count)
    if D != DW:
        there = there & (d[None, None, :] < D)
    row = h[:, None, None].to(tl.int64) * count + x[None, :, None]
    return tl.load(at + (row * TERMS + term) * D + d[None, None, :], mask=there, other=0.0)


@triton.jit
def load_of_rows(at, i, h, n, H: tl.constexpr, other):  # type: ignore[no-untyped-def]
    """One number a query and head, [i, heads] of [heads, n]."""
    place = at + h[None, :].to(tl.int64) * n + i[:, None]
    return tl.load(place, mask=(i[:, None] < n) & (h[None, :] < H), other=other)


@triton.jit
def load_logits(at, i, j, h, n, padded, H: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile [i, j, heads] of [heads, n, padded]."""
    row = h[None, None, :].to(tl.int64) * n + i[:, None, None]
    there = (i[:, None, None] < n) & (j[None, :, None] < padded) & (h[None, None, :] < H)
    return tl.load(at + row * padded + j[None, :, None], mask=there, other=0.0)


@triton.jit
def store_logits(at, tile, i, j, h, n, padded, H: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write what `load_logits` would read."""
    row = h[None, None, :].to(tl.int64) * n + i[:, None, None]
    there = (i[:, None, None] < n) & (j[None, :, None] < padded) & (h[None, None, :] < H)
    tl.store(at + row * padded + j[None, :, None], tile.to(at.dtype.element_ty), mask=there)


@triton.jit
def product(  # type: ignore[no-untyped-def]
    a, a_low, at, h, x, count,
    H: tl.constexpr, D: tl.constexpr, DW: tl.constexpr, TERMS: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Rows a [heads, i, columns] times the rows x that stand at `at`: [heads, i, x].

    With two terms a number is the sum of two of 16 bits, and the product of the two low ones is left out.
    """
    b = tl.permute(load_heads(at, h, x, 0, count, H, D, DW, TERMS), (0, 2, 1))
    sums = tl.zeros([a.shape[0], a.shape[1], b.shape[2]], tl.float32)
    if TERMS == 2:
        b_low = tl.permute(load_heads(at, h, x, 1, count, H, D, DW, TERMS), (0, 2, 1))
        sums = dot(a_low, b, sums, PRECISION, INTERPRETED)
        sums = dot(a, b_low, sums, PRECISION, INTERPRETED)
    return dot(a, b, sums, PRECISION, INTERPRETED)


@triton.jit
def forbid(logits, pair_mask, i, j, m_i, m_j, n, NEVER: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits [i, j, heads] that no key wins with, where a query may not attend or there is no key."""
    allowed = (i[:, None] < n) & (j[None, :] < n)
    if MASKED:
        place = pair_mask + i[:, None].to(tl.int64) * m_i + j[None, :].to(tl.int64) * m_j
        allowed = tl.load(place, mask=allowed, other=0) != 0
    return tl.where(allowed[:, :, None], logits, NEVER)


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    z, weight, q, q_scale, k, key_bias, v, logits, pair_mask, there, out, pair, lse,
    z_b, z_i, z_j, m_b, m_i, m_j,
    items, n, padded, blocks_a_part,
    H: tl.constexpr, HW: tl.constexpr, CZ: tl.constexpr, CZW: tl.constexpr,
    D: tl.constexpr, DW: tl.constexpr, DV: tl.constexpr, DVW: tl.constexpr,
    I: tl.constexpr, J: tl.constexpr, TERMS: tl.constexpr, CHUNKS: tl.constexpr, NEVER: tl.constexpr,
    FUSED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """I query rows, all heads, and a part of the keys: the means of values and of z, the logits' log-sum-exp in base 2.

    Writes out [parts, b, h, n, DV] (where `FUSED`; else the final logits, over those it read), pair
    [parts, b, n, h, CZ] and lse [parts, b, h, n]. A row that is not `there` gets zeros, and an lse of +inf, which makes
    its weights zero in the backward without a branch. No logit is -inf, so that no maximum is.
    """
    program, blocks = tl.program_id(0), tl.cdiv(n, I)
    block, rest = program % blocks, program // blocks
    item, part = (rest % items).to(tl.int64), (rest // items).to(tl.int64)
    i, h, c = block * I + tl.arange(0, I), tl.arange(0, HW), tl.arange(0, CZW)
    z += item * z_b
    pair_mask += item * m_b
    w_tile = load_weight(weight, i, h, CZ, CZW, HW, 0)
    if CHUNKS == 2:
        w_more = load_weight(weight, i, h, CZ, CZW, HW, 1)
        of_more = tl.zeros([I, HW, CZW], tl.float32)
    if FUSED:
        q += item * H * n * TERMS * D
        k += item * H * padded * TERMS * D
        v += item * H * padded * TERMS * DV
        key_bias += item * H * padded
        q_tile = load_heads(q, h, i, 0, n, H, D, DW, TERMS)
        q_low = load_heads(q, h, i, TERMS - 1, n, H, D, DW, TERMS)
        scale = load_of_rows(q_scale + item * H * n, i, h, n, H, 0.0)
        sums = tl.zeros([HW, I, DVW], tl.float32)
    else:
        logits += item * H * n * padded
    top = tl.full([I, HW], float("-inf"), tl.float32)
    total = tl.zeros([I, HW], tl.float32)
    of_pairs = tl.zeros([I, HW, CZW], tl.float32)
    first = part * blocks_a_part * J
    last = tl.minimum(first + blocks_a_part * J, n)
    for start in range(first, last, J):
        j = (start + tl.arange(0, J)).to(tl.int32)
        z_tile = load_pairs(z, i, j, z_i, z_j, n, CZ, CZW, 0)
        s = dot(z_tile, w_tile, tl.zeros([I, J, HW], tl.float32), PRECISION, INTERPRETED)
        if CHUNKS == 2:
            z_more = load_pairs(z, i, j, z_i, z_j, n, CZ, CZW, 1)
            s = dot(z_more, w_more, s, PRECISION, INTERPRETED)
        s *= SHARE * LOG2E
        if FUSED:
            lifted = product(q_tile, q_low, k, h, j, padded, H, D, DW, TERMS, PRECISION, INTERPRETED)
            s += tl.permute(lifted, (1, 2, 0)) * scale[:, None, :]
            at_keys = key_bias + h[None, :].to(tl.int64) * padded + j[:, None]
            s += tl.load(at_keys, mask=(j[:, None] < padded) & (h[None, :] < H), other=0.0)[None, :, :]
        else:
            s += load_logits(logits, i, j, h, n, padded, H) * LOG2E
        s = forbid(s, pair_mask, i, j, m_i, m_j, n, NEVER, MASKED)
        if not FUSED:
            store_logits(logits, s, i, j, h, n, padded, H)
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None, :])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        top = higher
        by_row = tl.permute(p, (0, 2, 1)).to(z_tile.dtype)
        of_pairs = dot(by_row, z_tile, of_pairs * shrink[:, :, None], PRECISION, INTERPRETED)
        if CHUNKS == 2:
            of_more = dot(by_row, z_more, of_more * shrink[:, :, None], PRECISION, INTERPRETED)
        if FUSED:
            v_tile = load_heads(v, h, j, 0, padded, H, DV, DVW, TERMS)
            by_head = tl.permute(p, (2, 0, 1)).to(v_tile.dtype)
            sums *= tl.permute(shrink, (1, 0))[:, :, None]
            sums = dot(by_head, v_tile, sums, PRECISION, INTERPRETED)
    takes_part = tl.load(there + item * n + i, mask=i < n, other=0) != 0
    share = tl.where(takes_part[:, None], 1.0 / total, 0.0)
    real = (i[:, None] < n) & (h[None, :] < H)
    at_row = ((part * items + item) * n + i[:, None]) * H + h[None, :]
    place = pair + at_row[:, :, None] * CZ + c[None, None, :]
    tl.store(place, of_pairs * share[:, :, None], mask=real[:, :, None] & (c[None, None, :] < CZ))
    if CHUNKS == 2:
        stored = real[:, :, None] & (c[None, None, :] < CZ - CZW)
        tl.store(place + CZW, of_more * share[:, :, None], mask=stored)
    at_head = ((part * items + item) * H + h[None, :]) * n + i[:, None]
    tl.store(lse + at_head, tl.where(takes_part[:, None], top + tl.log2(total), float("inf")), mask=real)
    if FUSED:
        d = tl.arange(0, DVW)
        stored = tl.permute(real, (1, 0))[:, :, None] & (d[None, None, :] < DV)
        place = out + tl.permute(at_head, (1, 0))[:, :, None] * DV + d[None, None, :]
        tl.store(place, sums * tl.permute(share, (1, 0))[:, :, None], mask=stored)


@triton.jit
def backward_kernel(  # type: ignore[no-untyped-def]
    z, joined, q, q_scale, k, key_bias, d_out, d_scale, v, logits, d_weights, pair_mask, lse, delta,
    d_z, weights, d_logits, d_bias_weight, excess,
    z_b, z_i, z_j, m_b, m_i, m_j,
    items, n, padded, blocks_a_part,
    H: tl.constexpr, HW: tl.constexpr, CZ: tl.constexpr, CZW: tl.constexpr,
    D: tl.constexpr, DW: tl.constexpr, DV: tl.constexpr, DVW: tl.constexpr,
    I: tl.constexpr, J: tl.constexpr, TERMS: tl.constexpr, CHUNKS: tl.constexpr, NEVER: tl.constexpr,
    FUSED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The gradient of z for I query rows and a part of the keys, each pair's written once; and what the rest needs.

    Writes the attention weights and the logits' gradient, [b, h, n, padded]; this program's share of the bias weight's,
    [programs, HW, CZ]; and `excess` [parts, b, h, n], a query's sum of the logits' gradient, which is zero but for what
    rounding left in `delta`. `joined` [b, n, 2 HW, CZ] holds, for each query and head, the bias weight and the gradient
    of the mean of z: z times it gives the bias and the weights' gradient in one product, and the logits' gradients and
    the weights times it the gradient of z.
    """
    program, blocks = tl.program_id(0), tl.cdiv(n, I)
    block, rest = program % blocks, program // blocks
    item, part = (rest % items).to(tl.int64), (rest // items).to(tl.int64)
    i, h, c = block * I + tl.arange(0, I), tl.arange(0, HW), tl.arange(0, CZW)
    z += item * z_b
    pair_mask += item * m_b
    joined += item * n * (2 * HW) * CZ
    right = load_joined(joined, i, n, CZ, CZW, HW, 0)
    turned = tl.permute(right, (0, 2, 1))
    if CHUNKS == 2:
        right_more = load_joined(joined, i, n, CZ, CZW, HW, 1)
        turned_more = tl.permute(right_more, (0, 2, 1))
        more_weight = tl.zeros([I, HW, CZW], tl.float32)
    of_lse = load_of_rows(lse + item * H * n, i, h, n, H, float("inf"))
    of_delta = load_of_rows(delta + item * H * n, i, h, n, H, 0.0)
    if FUSED:
        q += item * H * n * TERMS * D
        k += item * H * padded * TERMS * D
        d_out += item * H * n * TERMS * DV
        v += item * H * padded * TERMS * DV
        key_bias += item * H * padded
        q_tile = load_heads(q, h, i, 0, n, H, D, DW, TERMS)
        q_low = load_heads(q, h, i, TERMS - 1, n, H, D, DW, TERMS)
        scale = load_of_rows(q_scale + item * H * n, i, h, n, H, 0.0)
        do_tile = load_heads(d_out, h, i, 0, n, H, DV, DVW, TERMS)
        do_low = load_heads(d_out, h, i, TERMS - 1, n, H, DV, DVW, TERMS)
        do_scale = load_of_rows(d_scale + item * H * n, i, h, n, H, 0.0)
    else:
        logits += item * H * n * padded
        d_weights += item * H * n * padded
    weights += item * H * n * padded
    d_logits += item * H * n * padded
    d_z += item * n * n * CZ
    of_weight = tl.zeros([I, HW, CZW], tl.float32)
    of_row = tl.zeros([I, HW], tl.float32)
    first = part * blocks_a_part * J
    last = tl.minimum(first + blocks_a_part * J, n)
    for start in range(first, last, J):
        j = (start + tl.arange(0, J)).to(tl.int32)
        z_tile = load_pairs(z, i, j, z_i, z_j, n, CZ, CZW, 0)
        two = dot(z_tile, turned, tl.zeros([I, J, 2 * HW], tl.float32), PRECISION, INTERPRETED)
        if CHUNKS == 2:
            z_more = load_pairs(z, i, j, z_i, z_j, n, CZ, CZW, 1)
            two = dot(z_more, turned_more, two, PRECISION, INTERPRETED)
        bias, d_p = tl.split(tl.reshape(two, [I, J, HW, 2]))
        s = bias * (SHARE * LOG2E)
        if FUSED:
            lifted = product(q_tile, q_low, k, h, j, padded, H, D, DW, TERMS, PRECISION, INTERPRETED)
            s += tl.permute(lifted, (1, 2, 0)) * scale[:, None, :]
            at_keys = key_bias + h[None, :].to(tl.int64) * padded + j[:, None]
            s += tl.load(at_keys, mask=(j[:, None] < padded) & (h[None, :] < H), other=0.0)[None, :, :]
            values = product(do_tile, do_low, v, h, j, padded, H, DV, DVW, TERMS, PRECISION, INTERPRETED)
            d_p += tl.permute(values, (1, 2, 0)) * do_scale[:, None, :]
        else:
            s += load_logits(logits, i, j, h, n, padded, H) * LOG2E
            d_p += load_logits(d_weights, i, j, h, n, padded, H)
        s = forbid(s, pair_mask, i, j, m_i, m_j, n, NEVER, MASKED)
        p = tl.exp2(s - of_lse[:, None, :])
        d_s = p * (d_p - of_delta[:, None, :])
        of_row += tl.sum(d_s, 1)
        store_logits(weights, p, i, j, h, n, padded, H)
        store_logits(d_logits, d_s, i, j, h, n, padded, H)
        # Gradients are multiplied in bfloat16 beside a float16 z, too: they may be too small for float16.
        narrow = tl.float32 if z_tile.dtype == tl.float32 else tl.bfloat16
        left = tl.reshape(tl.join(d_s * SHARE, p), [I, J, 2 * HW]).to(narrow)
        d_pairs = dot(left, right.to(narrow), tl.zeros([I, J, CZW], tl.float32), PRECISION, INTERPRETED)
        store_pairs(d_z, d_pairs, i, j, n, CZ, CZW, 0)
        by_row = tl.permute(d_s, (0, 2, 1)).to(narrow)
        of_weight = dot(by_row, z_tile.to(narrow), of_weight, PRECISION, INTERPRETED)
        if CHUNKS == 2:
            d_more = dot(left, right_more.to(narrow), tl.zeros([I, J, CZW], tl.float32), PRECISION, INTERPRETED)
            store_pairs(d_z, d_more, i, j, n, CZ, CZW, 1)
            more_weight = dot(by_row, z_more.to(narrow), more_weight, PRECISION, INTERPRETED)
    at_head = ((part * items + item) * H + h[None, :]) * n + i[:, None]
    tl.store(excess + at_head, of_row, mask=(i[:, None] < n) & (h[None, :] < H))
    place = d_bias_weight + (program.to(tl.int64) * HW + h[:, None]) * CZ + c[None, :]
    tl.store(place, tl.sum(of_weight, 0) * SHARE, mask=(c[None, :] < CZ) & (h[:, None] < HW))
    if CHUNKS == 2:
        tl.store(place + CZW, tl.sum(more_weight, 0) * SHARE, mask=(c[None, :] < CZ - CZW) & (h[:, None] < HW))


#: Kernel name -> kernel.
KERNELS: dict[str, Any] = {"forward": forward_kernel, "backward": backward_kernel}
