"""The triangle multiplicative update of one pair tensor: projections by blocks of rows, products by blocks of channels.

The product over the third node is one matrix product of n x n a channel, so both factors are wanted channels first.
They come out of the projections that way (W x^T instead of x W^T), and only for the channels at hand. The product is
held in bands of rows, channels first within a band: a band is as large as its part of the result, which takes its
place. So the largest thing that exists is the result.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ..common.blocking import block_dtype, norm_dtype, pairs_per_block, slices
from ..common.matmul import accumulate_, write_product
from ..common.pair_blocks import layer_norm_backward
from ..dtypes import widest
from . import Weights

_CHANNELS = 32  # products at once: fewer leave the projections too narrow, more take memory
_BAND = 64  # rows: lower ones make the products too flat, higher ones take memory where a band becomes the result


def prepare(weights: Weights, z: Tensor) -> Weights:
    """The weights in the type in which blocks are multiplied."""
    norms = {name: getattr(weights, name).to(norm_dtype(z)) for name in Weights._fields if name.startswith("norm")}
    return weights.to(block_dtype(z))._replace(**norms)


def _blocks(z: Float[Tensor, "rows n cz"]) -> Iterator[tuple[slice, slice]]:
    """Blocks of rows, and the pairs in each."""
    count, n = z.shape[:2]
    for rows in slices(count, max(1, pairs_per_block(z) // max(n, 1))):
        yield rows, slice(rows.start * n, rows.stop * n)


def _norm_in(z: Float[Tensor, "r n cz"], w: Weights, eps: float) -> Float[Tensor, "pairs cz"]:
    x = z.to(w.p_in.dtype)
    return torch.layer_norm(x, x.shape[-1:], w.norm_in_weight, w.norm_in_bias, eps).flatten(0, 1)


def _project(
    weight: Float[Tensor, "some cz"], bias: Float[Tensor, " some"] | None, x: Float[Tensor, "pairs cz"]
) -> Float[Tensor, "some pairs"]:
    """A linear layer, channels first."""
    return weight @ x.t() if bias is None else torch.addmm(bias[:, None], weight, x.t())


def _some(x: Tensor | None, channels: Tensor) -> Tensor | None:
    return None if x is None else x[channels]


def _factors(
    z: Float[Tensor, "n n cz"],
    mask: Bool[Tensor, "n n"] | None,
    w: Weights,
    channels: slice,
    eps: float,
    factors: Float[Tensor, "2 some n n"],
) -> None:
    """Write the left and the right factor's given channels: projected, gated, zero where the mask is."""
    c, n = w.p_out.shape[1], z.shape[0]
    both = torch.cat([torch.arange(channels.start, channels.stop) + side for side in (0, c)]).to(z.device)
    p, g = w.p_in[both], w.g_in[both]
    p_bias, g_bias = _some(w.p_in_bias, both), _some(w.g_in_bias, both)
    flat = factors.view(len(both), n * n)
    for rows, pairs in _blocks(z):
        x = _norm_in(z[rows], w, eps)
        gate = _project(g, g_bias, x).sigmoid_()
        edges = _project(p, p_bias, x).mul_(gate)
        if mask is not None:
            edges *= mask[rows].reshape(-1)
        flat[:, pairs] = edges


def _multiply(
    factors: Float[Tensor, "2 some n n"], outgoing: bool, out: Float[Tensor, "some rows n"], rows: slice | None = None
) -> None:
    """Sum over the third node k: left_ik right_jk, or left_ki right_kj; for all rows i, or for some."""
    left, right = factors if outgoing else factors.transpose(2, 3)
    write_product(left if rows is None else left[:, rows], right.transpose(1, 2), out)


def _multiply_backward(
    factors: Float[Tensor, "2 some n n"], d_product: Float[Tensor, "some n n"], outgoing: bool
) -> Float[Tensor, "2 some n n"]:
    left, right = factors
    d_factors = torch.empty_like(factors)
    if outgoing:
        write_product(d_product, right, d_factors[0])
        write_product(d_product.transpose(1, 2), left, d_factors[1])
    else:
        write_product(right, d_product.transpose(1, 2), d_factors[0])
        write_product(left, d_product, d_factors[1])
    return d_factors


def forward_item(
    z: Float[Tensor, "n n cz"],
    mask: Bool[Tensor, "n n"] | None,
    w: Weights,
    outgoing: bool,
    eps: float,
    out: Float[Tensor, "n n cz"],
) -> None:
    """Write the update of one pair tensor."""
    n, c, dtype = z.shape[0], w.p_out.shape[1], w.p_in.dtype
    in_place = c == out.shape[-1] and dtype is out.dtype and out.is_contiguous()
    product = out if in_place else z.new_empty(n, n, c, dtype=dtype)
    bands = list(slices(n, _BAND))
    factors = product.new_empty(2, min(c, _CHANNELS), n, n)
    for channels in slices(c, _CHANNELS):
        if channels.stop - channels.start < factors.shape[1]:
            factors = product.new_empty(2, channels.stop - channels.start, n, n)
        _factors(z, mask, w, channels, eps, factors)
        for band in bands:
            _multiply(factors, outgoing, product[band].view(c, -1, n)[channels], band)
    del factors
    for band in bands:
        given = product[band].view(c, -1).t().contiguous()  # a copy: the result may take its place
        of_band = out[band]
        for rows, pairs in _blocks(of_band):
            normed = torch.layer_norm(given[pairs], (c,), w.norm_out_weight, w.norm_out_bias, eps)
            gate = F.linear(_norm_in(z[band][rows], w, eps), w.g_out, w.g_out_bias).sigmoid_()
            of_band[rows] = F.linear(normed, w.p_out, w.p_out_bias).mul_(gate).view(of_band[rows].shape)


def backward_item(
    d_out: Float[Tensor, "n n cz"],
    z: Float[Tensor, "n n cz"],
    mask: Bool[Tensor, "n n"] | None,
    w: Weights,
    sums: Weights,
    outgoing: bool,
    eps: float,
    dz: Float[Tensor, "n n cz"],
) -> None:
    """Write the gradient of one pair tensor; those of the weights are added to `sums`."""
    n, c = z.shape[0], w.p_out.shape[1]
    product = z.new_empty(c, n, n, dtype=w.p_in.dtype)
    # Both factors of all channels, for the product now and its gradient later, which then takes their place.
    factors = product.new_empty(2, c, n, n)
    _factors(z, mask, w, slice(0, c), eps, factors)
    _multiply(factors, outgoing, product)
    # The gate's share of the gradient waits here for the factors'; 16 bits would round the sum twice.
    dx = dz if dz.dtype is widest(dz) else torch.empty_like(dz, dtype=widest(dz))
    _output_backward(d_out, z, product, w, sums, eps, dx)
    for channels in slices(c, _CHANNELS):
        factors[:, channels] = _multiply_backward(factors[:, channels], product[channels], outgoing)
    del product
    _input_backward(factors, z, mask, w, sums, eps, dx, dz)


def _output_backward(
    d_out: Float[Tensor, "n n cz"],
    z: Float[Tensor, "n n cz"],
    product: Float[Tensor, "c n n"],
    w: Weights,
    sums: Weights,
    eps: float,
    dx: Float[Tensor, "n n cz"],
) -> None:
    """From the result to the product, which its gradient replaces; `dx` gets what passes through the output's gate."""
    flat = product.view(product.shape[0], -1)
    for rows, pairs in _blocks(z):
        given = flat[:, pairs].t().contiguous()
        norm = (given.shape[-1:], w.norm_out_weight, w.norm_out_bias)
        normed, mean, inverse_std = torch.native_layer_norm(given, *norm, eps)
        x = _norm_in(z[rows], w, eps)
        gate = F.linear(x, w.g_out, w.g_out_bias).sigmoid_()
        d_rows = d_out[rows].reshape(x.shape).to(x.dtype)
        d_gate = torch.ops.aten.sigmoid_backward(F.linear(normed, w.p_out, w.p_out_bias).mul_(d_rows), gate)
        d_last = gate.mul_(d_rows)
        _linear_sums(sums.p_out, sums.p_out_bias, d_last, normed)
        _linear_sums(sums.g_out, sums.g_out_bias, d_gate, x)
        dx[rows] = (d_gate @ w.g_out).view(dx[rows].shape)
        d_given = layer_norm_backward(
            d_last @ w.p_out, given, *norm[1:], sums.norm_out_weight, sums.norm_out_bias, mean, inverse_std
        )
        flat[:, pairs] = d_given.t()


def _input_backward(
    d_factors: Float[Tensor, "2 c n n"],
    z: Float[Tensor, "n n cz"],
    mask: Bool[Tensor, "n n"] | None,
    w: Weights,
    sums: Weights,
    eps: float,
    dx: Float[Tensor, "n n cz"],
    dz: Float[Tensor, "n n cz"],
) -> None:
    """From the factors to z; `dx` holds what came through the output's gate, and may be `dz`'s memory."""
    flat = d_factors.view(-1, z.shape[0] ** 2)
    for rows, pairs in _blocks(z):
        given = z[rows].to(w.p_in.dtype).contiguous()
        norm = (given.shape[-1:], w.norm_in_weight, w.norm_in_bias)
        normed, mean, inverse_std = torch.native_layer_norm(given, *norm, eps)
        x = normed.flatten(0, 1)
        d_edges = flat[:, pairs]
        if mask is not None:
            d_edges = d_edges * mask[rows].reshape(-1)
        gate = _project(w.g_in, w.g_in_bias, x).sigmoid_()
        d_gate = torch.ops.aten.sigmoid_backward(_project(w.p_in, w.p_in_bias, x).mul_(d_edges), gate)
        d_p = gate.mul_(d_edges)
        _linear_sums(sums.p_in, sums.p_in_bias, d_p.t(), x)
        _linear_sums(sums.g_in, sums.g_in_bias, d_gate.t(), x)
        d_normed = torch.mm(d_p.t(), w.p_in).addmm_(d_gate.t(), w.g_in).view(given.shape)
        d_given = layer_norm_backward(
            (d_normed + dx[rows]).to(given.dtype),
            given,
            *norm[1:],
            sums.norm_in_weight,
            sums.norm_in_bias,
            mean,
            inverse_std,
        )
        dz[rows] = d_given


def _linear_sums(
    of_weight: Float[Tensor, "o i"],
    of_bias: Float[Tensor, " o"] | None,
    d_out: Float[Tensor, "pairs o"],
    x: Float[Tensor, "pairs i"],
) -> None:
    """Add a linear layer's weight's and bias's gradients for a block."""
    accumulate_(of_weight, d_out.t(), x)
    assert of_bias is not None
    of_bias += d_out.sum(0, dtype=of_bias.dtype)
