"""The edge transition in Triton: each program updates a tile of pairs, and no hidden layer reaches memory.

The first and the last layer are split as in `_rows.py`, so that what depends on one residue is added from [n, c]. Per
pair remain the products with the pair's own share and with the second layer: the first hidden layer of a tile is held
in registers, in parts of 64 columns, and the second is made and used up some columns at a time.

A program holds a rectangle of pairs, so that few residues' shares serve all of them. Offsets into pair tensors are 64
bits wide; those into [n, c], and into the hidden layers of a block of rows, are not.

For the backward pass `tile_kernel` runs again and keeps both hidden layers of a block of rows, and `gradients_kernel`
goes back through them. It has the same shape: where one adds residues' shares and clamps, the other sets to zero where
the clamp was. The gradients of the weights are sums over all pairs, which are left to cuBLAS. Each kernel is the only
writer of what it writes, in a fixed order: every run gives the same bits.
"""

from typing import Any

import triton
import triton.language as tl

from ..triton_tools._language import dot


@triton.jit
def rectangle(program, first, n, last, I: tl.constexpr, J: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: E741
    """Rows, columns and existence of a program's pairs; rows run from `first` to `last`."""
    columns = tl.cdiv(n, J)
    pair = tl.arange(0, I * J)
    i = first + (program // columns) * I + pair // J
    j = (program % columns) * J + pair % J
    return i, j, (i < last) & (j < n)


@triton.jit
def load_pairs(at, i, j, there, stride_i, stride_j, C: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile [pairs, WIDTH] of a pair tensor, zeros beyond."""
    c = tl.arange(0, WIDTH)
    inside = there[:, None]
    if C != WIDTH:
        inside = inside & (c[None, :] < C)
    place = at + i[:, None].to(tl.int64) * stride_i + j[:, None].to(tl.int64) * stride_j + c[None, :]
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def store_pairs(at, tile, i, j, there, stride_i, stride_j, C: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write what `load_pairs` would read."""
    c = tl.arange(0, WIDTH)
    inside = there[:, None]
    if C != WIDTH:
        inside = inside & (c[None, :] < C)
    place = at + i[:, None].to(tl.int64) * stride_i + j[:, None].to(tl.int64) * stride_j + c[None, :]
    tl.store(place, tile.to(at.dtype.element_ty), mask=inside)


@triton.jit
def shares(of_i, of_j, i, j, there, columns, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """What both residues of each pair add to some columns; both are [n, WIDTH], in float32."""
    inside = there[:, None]
    rows = tl.load(of_i + i[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)
    return rows + tl.load(of_j + j[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)


@triton.jit
def weights(at, rows, columns, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of a matrix whose rows are WIDTH long; matrices are padded, so that every block is whole."""
    return tl.load(at + rows[:, None] * WIDTH + columns[None, :])


@triton.jit
def first_part(  # type: ignore[no-untyped-def]
    z_tile, w_first, first_i, first_j, i, j, there, K: tl.constexpr,
    Z: tl.constexpr, PART: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The K-th part of the first hidden layer."""
    columns = K * PART + tl.arange(0, PART)
    sums = shares(first_i, first_j, i, j, there, columns, HIDDEN)
    sums = dot(z_tile, weights(w_first, tl.arange(0, Z), columns, HIDDEN), sums, PRECISION, INTERPRETED)
    return tl.maximum(sums, 0.0).to(z_tile.dtype)


@triton.jit
def keep(at, tile, pair, there, columns, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write some columns of a hidden layer, or of its gradient."""
    place = at + pair[:, None] * WIDTH + columns[None, :]
    tl.store(place, tile, mask=there[:, None])


@triton.jit
def tile_kernel(  # type: ignore[no-untyped-def]
    z, there_, w_first, first_i, first_j, w_second, b_second, w_out, w_skip, last_i, last_j, norm_weight, norm_bias,
    out, d_out, h_first, h_second, d_last, d_norm_weight, d_norm_bias,
    z_i, z_j, out_i, out_j, d_out_i, d_out_j, first, last, n, eps,
    CZ: tl.constexpr, C_OUT: tl.constexpr, Z: tl.constexpr, OUT: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    I: tl.constexpr, J: tl.constexpr, BLOCK: tl.constexpr,  # noqa: E741
    MASKED: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Update a rectangle of pairs; or, for the backward pass, keep its hidden layers and the last layer's gradient.

    z and out are of one batch item. Weights lie as the products take them, [in, out], padded with zeros: z's share of
    the first layer [Z, HIDDEN], the second [HIDDEN, HIDDEN], the last [HIDDEN, OUT] and z's share of it [Z, OUT].
    """
    HIDDEN: tl.constexpr = PART * PARTS
    program = tl.program_id(0)
    i, j, there = rectangle(program, first, n, last, I, J)
    pair = (i - first) * n + j
    z_tile = load_pairs(z, i, j, there, z_i, z_j, CZ, Z)
    of_part, of_out = tl.arange(0, PART), tl.arange(0, OUT)
    parts = ()
    for k in tl.static_range(PARTS):
        part = first_part(z_tile, w_first, first_i, first_j, i, j, there, k, Z, PART, HIDDEN, PRECISION, INTERPRETED)
        if BACKWARD:
            keep(h_first, part, pair, there, k * PART + of_part, HIDDEN)
        parts = parts + (part,)  # type: ignore[assignment] # noqa: RUF005 - Triton knows no unpacking
    sums = tl.zeros([I * J, OUT], tl.float32)
    for start in range(0, HIDDEN, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        h = tl.zeros([I * J, BLOCK], tl.float32)
        for k in tl.static_range(PARTS):
            h = dot(parts[k], weights(w_second, k * PART + of_part, columns, HIDDEN), h, PRECISION, INTERPRETED)
        h = tl.maximum(h + tl.load(b_second + columns)[None, :], 0.0).to(z_tile.dtype)
        if BACKWARD:
            keep(h_second, h, pair, there, columns, HIDDEN)
        sums = dot(h, weights(w_out, columns, of_out, OUT), sums, PRECISION, INTERPRETED)
    sums = dot(z_tile, weights(w_skip, tl.arange(0, Z), of_out, OUT), sums, PRECISION, INTERPRETED)
    sums += shares(last_i, last_j, i, j, there, of_out, OUT)

    # LayerNorm over C_OUT columns; what lies beyond is zero, and left out of the second sum.
    inside = there[:, None]
    if C_OUT != OUT:
        inside = inside & (of_out[None, :] < C_OUT)
    centred = tl.where(inside, sums - (tl.sum(sums, 1) / C_OUT)[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C_OUT + eps)
    normal = centred * inverse[:, None]
    if MASKED:
        takes_part = tl.load(there_ + i, mask=there, other=0.0) * tl.load(there_ + j, mask=there, other=0.0) > 0.0
        inside = inside & takes_part[:, None]
    scale = tl.load(norm_weight + of_out)[None, :]
    if BACKWARD:
        given = load_pairs(d_out, i, j, there, d_out_i, d_out_j, C_OUT, OUT).to(tl.float32)
        given = tl.where(inside, given, 0.0)
        normal = tl.where(inside, normal, 0.0)
        place = program.to(tl.int64) * OUT + of_out
        tl.store(d_norm_weight + place, tl.sum(given * normal, 0))
        tl.store(d_norm_bias + place, tl.sum(given, 0))
        given *= scale
        along = tl.sum(given * normal, 1) / C_OUT
        given -= (tl.sum(given, 1) / C_OUT)[:, None] + normal * along[:, None]
        given = tl.where(inside, given * inverse[:, None], 0.0)
        keep(d_last, given.to(z_tile.dtype), pair, there, of_out, OUT)
    else:
        found = tl.where(inside, normal * scale + tl.load(norm_bias + of_out)[None, :], 0.0)
        store_pairs(out, found, i, j, there, out_i, out_j, C_OUT, OUT)


@triton.jit
def second_part(  # type: ignore[no-untyped-def]
    d_tile, w_out, h_second, d_second, pair, there, K: tl.constexpr,
    OUT: tl.constexpr, PART: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The K-th part of the second hidden layer's gradient, kept and given."""
    columns = K * PART + tl.arange(0, PART)
    place = pair[:, None] * HIDDEN + columns[None, :]
    positive = tl.load(h_second + place, mask=there[:, None], other=0.0) > 0.0
    found = dot(d_tile, weights(w_out, tl.arange(0, OUT), columns, HIDDEN),
                tl.zeros([d_tile.shape[0], PART], tl.float32), PRECISION, INTERPRETED)  # fmt: skip
    found = tl.where(positive, found, 0.0).to(d_tile.dtype)
    tl.store(d_second + place, found, mask=there[:, None])
    return found


@triton.jit
def gradients_kernel(  # type: ignore[no-untyped-def]
    d_last, h_first, h_second, w_out, w_second, w_first, w_skip, d_first, d_second, d_z,
    d_z_i, d_z_j, first, last, n,
    CZ: tl.constexpr, Z: tl.constexpr, OUT: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    I: tl.constexpr, J: tl.constexpr, BLOCK: tl.constexpr,  # noqa: E741
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The gradients of both hidden layers and of z, for a rectangle of pairs.

    Weights lie as PyTorch holds them, [out, in], which is what products with gradients take: the last layer
    [OUT, HIDDEN], the second [HIDDEN, HIDDEN], z's share of the first [HIDDEN, Z] and of the last [OUT, Z].
    """
    HIDDEN: tl.constexpr = PART * PARTS
    i, j, there = rectangle(tl.program_id(0), first, n, last, I, J)
    pair = (i - first) * n + j
    of_out, of_part, of_z = tl.arange(0, OUT), tl.arange(0, PART), tl.arange(0, Z)
    d_tile = tl.load(d_last + pair[:, None] * OUT + of_out[None, :], mask=there[:, None], other=0.0)
    parts = ()
    for k in tl.static_range(PARTS):
        part = second_part(d_tile, w_out, h_second, d_second, pair, there, k, OUT, PART, HIDDEN, PRECISION, INTERPRETED)
        parts = parts + (part,)  # type: ignore[assignment] # noqa: RUF005 - Triton knows no unpacking
    sums = tl.zeros([I * J, Z], tl.float32)
    for start in range(0, HIDDEN, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        found = tl.zeros([I * J, BLOCK], tl.float32)
        for k in tl.static_range(PARTS):
            found = dot(parts[k], weights(w_second, k * PART + of_part, columns, HIDDEN), found, PRECISION, INTERPRETED)
        place = pair[:, None] * HIDDEN + columns[None, :]
        positive = tl.load(h_first + place, mask=there[:, None], other=0.0) > 0.0
        found = tl.where(positive, found, 0.0).to(d_tile.dtype)
        tl.store(d_first + place, found, mask=there[:, None])
        sums = dot(found, weights(w_first, columns, of_z, Z), sums, PRECISION, INTERPRETED)
    sums = dot(d_tile, weights(w_skip, of_out, of_z, Z), sums, PRECISION, INTERPRETED)
    store_pairs(d_z, sums, i, j, there, d_z_i, d_z_j, CZ, Z)


#: Kernel name -> kernel: one serves both the forward pass and the keeping of hidden layers.
KERNELS: dict[str, Any] = {"forward": tile_kernel, "hidden": tile_kernel, "gradients": gradients_kernel}
