"""Invariant point attention's forward pass with tensor descriptors, for chips of capability 9.0 and more.

A descriptor tells a chip's copy engine (TMA) of a tensor's sizes and strides: a program then asks for a tile in one
instruction, and what lies beyond the tensor's edge arrives as zeros. Importing this imports Triton.

What that buys over the pointers of `_triton`: z may be used as it is and turned without losing the load ahead, so that
heads are the narrow side of the products with z (8 of them fill it, where rows of a product come in sixteens); no
thread computes addresses. There is room for 16 query rows, for which keys and values are read half as often as for 8.

Keys come in two rows of `PW` columns each: points to 11 bits beside one half of the scalars, and what was left of the
points beside the other half. Of a product of sums of two terms, the one of the two low terms is left out.
"""

# ruff: noqa: E741 - I and J are the numbers of queries and keys in a tile
import triton
import triton.language as tl

from ..triton_tools._language import LOG2E, dot
from ._triton import SHARE, load_of_rows


@triton.jit
def load_query(at, h, i, n, part, H: tl.constexpr, PW: tl.constexpr):  # type: ignore[no-untyped-def]
    """One of three parts of queries i, all heads, turned: [heads, columns, i] of [heads, n, 3, PW]."""
    row = h[:, None, None].to(tl.int64) * n + i[None, None, :]
    place = at + (row * 3 + part) * PW + tl.arange(0, PW)[None, :, None]
    return tl.load(place, mask=(h[:, None, None] < H) & (i[None, None, :] < n), other=0.0)


@triton.jit
def load_key_bias(at, j, h, padded, H: tl.constexpr):  # type: ignore[no-untyped-def]
    """What keys add to their logits, [j, heads] of [heads, padded]."""
    place = at + h[None, :].to(tl.int64) * padded + j[:, None]
    return tl.load(place, mask=(j[:, None] < padded) & (h[None, :] < H), other=0.0)


@triton.jit
def load_allowed(at, i, j, m_i, m_j, n):  # type: ignore[no-untyped-def]
    """Whether queries may attend to keys, [i, j]; not beyond the last of either."""
    place = at + i[:, None].to(tl.int64) * m_i + j[None, :].to(tl.int64) * m_j
    return tl.load(place, mask=(i[:, None] < n) & (j[None, :] < n), other=0)


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    z, k, v, weight, q, q_scale, key_bias, pair_mask, there, out, pair, lse,
    m_b, m_i, m_j,
    items, n, padded, blocks_a_part,
    H: tl.constexpr, HW: tl.constexpr, CZ: tl.constexpr, CZW: tl.constexpr,
    PW: tl.constexpr, DV: tl.constexpr, DVW: tl.constexpr,
    I: tl.constexpr, J: tl.constexpr, NEVER: tl.constexpr,
    MASKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """I query rows, all heads, and a part of the keys: the means of values and of z, the logits' log-sum-exp in base 2.

    Three descriptors: z [b, n, n, CZ], k [2 b, h, padded, up to PW] and v [b, h, padded, up to DVW]. The rest, and what
    is written, is as for the kernel without descriptors. No key beyond the last is masked here: `key_bias` forbids it.
    """
    program, blocks = tl.program_id(0), tl.cdiv(n, I)
    block, rest = program % blocks, program // blocks
    item, part = rest % items, rest // items
    far = item.to(tl.int64)  # descriptors take 32 bits, and multiply in 64
    i, h, c = block * I + tl.arange(0, I), tl.arange(0, HW), tl.arange(0, CZW)
    pair_mask += far * m_b
    key_bias += far * H * padded
    q += far * H * n * 3 * PW
    q_first, q_second, q_low = (
        load_query(q, h, i, n, 0, H, PW), load_query(q, h, i, n, 1, H, PW), load_query(q, h, i, n, 2, H, PW)
    )  # fmt: skip
    scale = load_of_rows(q_scale + far * H * n, i, h, n, H, 0.0)
    w_tile = tl.load(weight + c[:, None] * HW + h[None, :], mask=c[:, None] < CZ, other=0.0)
    top = tl.full([I, HW], float("-inf"), tl.float32)
    total = tl.zeros([I, HW], tl.float32)
    of_pairs = tl.zeros([I, CZW, HW], tl.float32)
    sums = tl.zeros([HW, DVW, I], tl.float32)
    first = part * blocks_a_part * J
    last = tl.minimum(first + blocks_a_part * J, n)
    # What is no product's operand is asked for a round ahead by hand.
    next_bias = load_key_bias(key_bias, first + tl.arange(0, J), h, padded, H)
    if MASKED:
        next_allowed = load_allowed(pair_mask, i, first + tl.arange(0, J), m_i, m_j, n)
    for start in range(first, last, J):
        j = start + J + tl.arange(0, J)
        bias, next_bias = next_bias, load_key_bias(key_bias, j, h, padded, H)
        if MASKED:
            allowed, next_allowed = next_allowed, load_allowed(pair_mask, i, j, m_i, m_j, n)
        z_tile = tl.reshape(z.load([item, block * I, start, 0]), [I, J, CZW])
        flat = tl.reshape(z_tile, [I * J, CZW])
        s = tl.reshape(dot(flat, w_tile, tl.zeros([I * J, HW], tl.float32), "ieee", INTERPRETED), [I, J, HW])
        k_low = tl.reshape(k.load([items + item, 0, start, 0]), [HW, J, PW])
        lifted = dot(k_low, q_second, tl.zeros([HW, J, I], tl.float32), "ieee", INTERPRETED)
        k_high = tl.reshape(k.load([item, 0, start, 0]), [HW, J, PW])
        lifted = dot(k_high, q_low, lifted, "ieee", INTERPRETED)
        lifted = dot(k_high, q_first, lifted, "ieee", INTERPRETED)
        s = s * (SHARE * LOG2E) + tl.permute(lifted, (2, 1, 0)) * scale[:, None, :]
        s += bias[None, :, :]
        if MASKED:
            s = tl.where((allowed != 0)[:, :, None], s, NEVER)
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None, :])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        top = higher
        turned = tl.permute(z_tile, (0, 2, 1))
        of_pairs = dot(turned, p.to(z_tile.dtype), of_pairs * shrink[:, None, :], "ieee", INTERPRETED)
        v_tile = tl.reshape(v.load([item, 0, start, 0]), [HW, J, DVW])
        by_head = tl.permute(p, (2, 1, 0)).to(v_tile.dtype)
        sums *= tl.permute(shrink, (1, 0))[:, None, :]
        sums = dot(tl.permute(v_tile, (0, 2, 1)), by_head, sums, "ieee", INTERPRETED)
    takes_part = tl.load(there + far * n + i, mask=i < n, other=0) != 0
    share = tl.where(takes_part[:, None], 1.0 / total, 0.0)
    real = (i[:, None] < n) & (h[None, :] < H)
    at_item = part.to(tl.int64) * items + item
    at_row = (at_item * n + i[:, None]) * H + h[None, :]
    place = pair + at_row[:, None, :] * CZ + c[None, :, None]
    tl.store(place, of_pairs * share[:, None, :], mask=real[:, None, :] & (c[None, :, None] < CZ))
    at_head = (at_item * H + h[None, :]) * n + i[:, None]
    tl.store(lse + at_head, tl.where(takes_part[:, None], top + tl.log2(total), float("inf")), mask=real)
    d = tl.arange(0, DVW)
    stored = tl.permute(real, (1, 0))[:, None, :] & (d[None, :, None] < DV)
    place = out + tl.permute(at_head, (1, 0))[:, None, :] * DV + d[None, :, None]
    tl.store(place, sums * tl.permute(share, (1, 0))[:, None, :], mask=stored)
