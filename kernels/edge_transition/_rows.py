"""The edge transition over one block of query rows: the pieces that the streamed kernels are made of.

The first and the last layer act on [z_ij, n_i, n_j]. Their weights are split, so that what depends on one residue is
computed once a residue; per pair remain four products.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..common.blocking import Scratch, block_dtype, norm_dtype
from ..common.matmul import accumulate_
from ..common.pair_blocks import (
    add_rows,
    layer_norm_rows,
    layer_norm_rows_backward,
    relu_,
    relu_backward_,
    zeros_like_wide,
)
from ..dtypes import widest


class Split(NamedTuple):
    """What a block needs: the residues' shares of the first and last layer, and the pairs' weights.

    Shapes: first_i, first_j [b, n, hidden]; last_i, last_j [b, n, cz_out]; weight_1 [hidden, cz]; weight_2
    [hidden, hidden]; bias_2 [hidden]; weight_out [cz_out, hidden]; weight_skip [cz_out, cz]; norm_* [cz_out].
    """

    first_i: Tensor
    first_j: Tensor
    last_i: Tensor
    last_j: Tensor
    weight_1: Tensor
    weight_2: Tensor
    bias_2: Tensor
    weight_out: Tensor
    weight_skip: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


def split(
    nodes: Float[Tensor, "b n cn"],
    cz: int,
    weight_1: Float[Tensor, "hidden hidden"],
    bias_1: Float[Tensor, " hidden"],
    weight_2: Float[Tensor, "hidden hidden"],
    bias_2: Float[Tensor, " hidden"],
    weight_out: Float[Tensor, "cz_out hidden"],
    bias_out: Float[Tensor, " cz_out"],
    norm_weight: Float[Tensor, " cz_out"],
    norm_bias: Float[Tensor, " cz_out"],
) -> Split:
    """Take the residues' share out of the first and the last layer. Differentiable, and of the size of n."""
    cn = nodes.shape[-1]
    first_z, first_i, first_j = weight_1.split([cz, cn, cn], dim=1)
    skip_z, skip_i, skip_j = weight_out.split([cz, cn, cn], dim=1)
    return Split(
        nodes @ first_i.t() + bias_1,
        nodes @ first_j.t(),
        nodes @ skip_i.t() + bias_out,
        nodes @ skip_j.t(),
        first_z.contiguous(),
        weight_2,
        bias_2,
        weight_out,
        skip_z.contiguous(),
        norm_weight,
        norm_bias,
    )


def split_exactly(nodes: Float[Tensor, "b n cn"], cz: int, *weights: Tensor) -> list[Tensor]:
    """The parts in the widest type of nodes and weights, as a custom operator takes them.

    The residues' shares are sums of a few hundred terms and cost next to nothing: they are never rounded to 16 bits.
    """
    dtype = widest(nodes, weights[0])
    return list(split(nodes.to(dtype), cz, *(weight.to(dtype) for weight in weights)))


def prepare(parts: Split, z: Tensor) -> Split:
    """The pairs' weights in the type in which blocks of z are multiplied; the residues' shares as they are."""
    dtype, of_norm = block_dtype(z), norm_dtype(z)
    types = {**dict.fromkeys(parts._fields, dtype), "norm_weight": of_norm, "norm_bias": of_norm}
    for name in ("first_i", "first_j", "last_i", "last_j"):
        types[name] = torch.promote_types(getattr(parts, name).dtype, dtype)
    return Split._make(part.to(types[name]).contiguous() for name, part in parts._asdict().items())


class Hidden(NamedTuple):
    """What a block passes through, [pairs, ...]: both hidden layers after their ReLU, and the last layer's output."""

    first: Tensor
    second: Tensor
    last: Tensor


def hidden_rows(parts: Split, i: int, rows: slice, z: Float[Tensor, "rows n cz"], scratch: Scratch) -> Hidden:
    """The perceptron and the last layer for a block; biases are laid down first and the products added onto them."""
    pairs = z.reshape(-1, z.shape[-1])
    hidden = parts.weight_2.shape[0]
    first = _residues(parts.first_i[i, rows], parts.first_j[i], "first", z.dtype, scratch)
    relu_(first.addmm_(pairs, parts.weight_1.t()))
    second = scratch.take("second", pairs.shape[0], hidden)
    relu_(torch.addmm(parts.bias_2, first, parts.weight_2.t(), out=second))
    out = _residues(parts.last_i[i, rows], parts.last_j[i], "last", z.dtype, scratch)
    out.addmm_(second, parts.weight_out.t()).addmm_(pairs, parts.weight_skip.t())
    return Hidden(first, second, out)


def _residues(
    rows: Float[Tensor, "rows c"], columns: Float[Tensor, "n c"], name: str, dtype: torch.dtype, scratch: Scratch
) -> Float[Tensor, "pairs c"]:
    """Lay down the residues' shares of every pair of a block: their sum, rounded once."""
    shape = (rows.shape[0] * columns.shape[0], columns.shape[1])
    if rows.dtype is dtype:
        return add_rows(rows, columns, scratch.take(name, *shape))
    wide = add_rows(rows, columns, scratch.take("residues", *shape, dtype=rows.dtype))
    return scratch.take(name, *shape).copy_(wide)


def forward_rows(
    parts: Split,
    i: int,
    rows: slice,
    z: Float[Tensor, "rows n cz"],
    mask: Bool[Tensor, " n"] | None,
    eps: float,
    scratch: Scratch,
) -> Float[Tensor, "rows n cz_out"]:
    """The new pair representation of a block; a pair with a masked residue is zero."""
    last = hidden_rows(parts, i, rows, z, scratch).last
    return layer_norm_rows(last, parts.norm_weight, parts.norm_bias, rows, mask, eps)


def backward_rows(
    parts: Split,
    gradients: Split,
    i: int,
    rows: slice,
    z: Float[Tensor, "rows n cz"],
    hidden: Hidden,
    d_out: Float[Tensor, "rows n cz_out"],
    mask: Bool[Tensor, " n"] | None,
    eps: float,
    scratch: Scratch,
) -> Float[Tensor, "rows n cz"]:
    """The gradient of a block of z; those of `parts` are added to `gradients`.

    Args:
        parts: As prepared.
        gradients: Sums so far, in float32 at least: sums over many pairs lose too much in 16 bits.
        i: Batch item.
        rows: Query rows.
        z: The block.
        hidden: What `hidden_rows` gave for it. Overwritten.
        d_out: The gradient of the block's output.
        mask: Residues that take part.
        eps: LayerNorm's epsilon.
        scratch: Memory of the pass.

    Returns:
        The gradient, in scratch memory: copy it before the next block.
    """
    count, n, cz = z.shape
    pairs = z.reshape(count * n, cz)
    wide = gradients.weight_2.dtype
    d_last = layer_norm_rows_backward(
        d_out,
        hidden.last,
        parts.norm_weight,
        parts.norm_bias,
        gradients.norm_weight,
        gradients.norm_bias,
        rows,
        mask,
        eps,
    )
    by_pair = d_last.view(count, n, -1)
    gradients.last_i[i, rows] = by_pair.sum(1, dtype=wide)
    gradients.last_j[i].add_(by_pair.sum(0, dtype=wide))
    accumulate_(gradients.weight_out, d_last.t(), hidden.second)
    accumulate_(gradients.weight_skip, d_last.t(), pairs)

    d_second = torch.mm(d_last, parts.weight_out, out=scratch.take("d_second", *hidden.second.shape))
    relu_backward_(d_second, hidden.second)
    gradients.bias_2.add_(d_second.sum(0, dtype=wide))
    accumulate_(gradients.weight_2, d_second.t(), hidden.first)

    d_first = relu_backward_(torch.mm(d_second, parts.weight_2, out=hidden.second), hidden.first)
    by_pair = d_first.view(count, n, -1)
    gradients.first_i[i, rows] = by_pair.sum(1, dtype=wide)
    gradients.first_j[i].add_(by_pair.sum(0, dtype=wide))
    accumulate_(gradients.weight_1, d_first.t(), pairs)
    dz = torch.mm(d_first, parts.weight_1, out=scratch.take("dz", count * n, cz))
    return dz.addmm_(d_last, parts.weight_skip).view(count, n, cz)


def zero_gradients(parts: Split) -> Split:
    """Sums to fill, shaped as `parts`."""
    return Split(*(zeros_like_wide(part) for part in parts))
