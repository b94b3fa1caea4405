"""Edge features over one block of query rows: the pieces that the streamed kernel is made of.

The first layer acts on the concatenated features of a pair, most of which take few values: what depends on one residue
is computed once a residue, the sequence distance takes 2n - 1 values, and the two distograms and the chain flag
together select one row of a small table.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..common.blocking import Scratch, block_dtype, norm_dtype
from ..common.matmul import accumulate_
from ..common.pair_blocks import layer_norm_rows, layer_norm_rows_backward, relu_, relu_backward_
from ..common.sinusoidal import sinusoids
from . import MAX_RELATIVE_POSITION
from .reference import bin_edges


class Split(NamedTuple):
    """What a block needs.

    Shapes: first_i, first_j [b, n, cz], the residues' shares of the first layer, with its bias; relpos [2n - 1, cz],
    the share of the sequence distance, from n - 1 down to 1 - n; bins [(num_bins + 1)^2 * (1 or 2), cz], the share of
    the distograms and the chain flag; weight_2, weight_3 [cz, cz]; bias_2, bias_3, norm_weight, norm_bias [cz].
    """

    first_i: Tensor
    first_j: Tensor
    relpos: Tensor
    bins: Tensor
    weight_2: Tensor
    bias_2: Tensor
    weight_3: Tensor
    bias_3: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


class Geometry(NamedTuple):
    """What selects a row of the table: coordinates in Angstrom [b, n, 3], twice, chain indices [b, n], and the bins."""

    positions: Tensor
    positions_sc: Tensor
    chain: Tensor | None
    num_bins: int


def split(
    nodes: Float[Tensor, "b n f"],
    diffuse: Float[Tensor, "b n"] | None,
    with_chain: bool,
    num_bins: int,
    relpos_weight: Float[Tensor, "f f"],
    relpos_bias: Float[Tensor, " f"],
    weights: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor, Tensor, Tensor],
    norm_weight: Float[Tensor, " cz"],
    norm_bias: Float[Tensor, " cz"],
) -> Split:
    """Take the first layer apart, by the columns that its features stand in. Differentiable, and of the size of n."""
    f, n = nodes.shape[-1], nodes.shape[1]
    sizes = [f, f, relpos_weight.shape[0], num_bins, num_bins]
    sizes += [1] if with_chain else []
    sizes += [1, 1] if diffuse is not None else []
    of_i, of_j, of_relpos, of_bins, of_bins_sc, *rest = weights[0].split(sizes, dim=1)
    first_i, first_j = nodes @ of_i.t() + biases[0], nodes @ of_j.t()
    if diffuse is not None:
        flag = diffuse.to(nodes.dtype)[..., None]
        first_i, first_j = first_i + flag * rest[-2].t(), first_j + flag * rest[-1].t()

    offsets = torch.arange(n - 1, -n, -1, device=nodes.device)
    waves = sinusoids(offsets, relpos_weight.shape[1], MAX_RELATIVE_POSITION, nodes.dtype)
    relpos = F.linear(waves, relpos_weight, relpos_bias)

    # Row 0 of each table is for a distance in no bin, and adds nothing.
    table, table_sc = F.pad(of_bins.t(), (0, 0, 1, 0)), F.pad(of_bins_sc.t(), (0, 0, 1, 0))
    bins = (table[:, None] + table_sc[None]).flatten(0, 1)
    if with_chain:
        bins = torch.cat([bins, bins + rest[0].t()])
    residues, pairs = (first_i, first_j, relpos @ of_relpos.t(), bins), (weights[1], biases[1], weights[2], biases[2])
    return Split(*residues, *pairs, norm_weight, norm_bias)


def prepare(parts: Split, out: Tensor) -> Split:
    """The pairs' weights in the type in which blocks of `out` are multiplied; the first layer's shares as they are."""
    dtype, of_norm = block_dtype(out), norm_dtype(out)
    shares = ("first_i", "first_j", "relpos", "bins")
    rest = {name: part.to(dtype) for name, part in parts._asdict().items() if name not in shares}
    norms = {name: getattr(parts, name).to(of_norm) for name in ("norm_weight", "norm_bias")}
    return parts._replace(**{**rest, **norms})


def _bin(positions: Float[Tensor, "n 3"], rows: slice, num_bins: int) -> Int[Tensor, "rows n"]:
    """0 for a distance in no bin, else the bin's number from 1. Both edges of a bin are exclusive."""
    # Norm of differences, as the definition has it: distances from inner products are off by more than a bin's edge.
    distance = torch.linalg.vector_norm(positions[rows, None] - positions, dim=-1)
    edges = bin_edges(num_bins, positions)
    below = torch.bucketize(distance, edges)
    on_edge = below != torch.bucketize(distance, edges, right=True)
    return below.masked_fill_(on_edge | (distance >= 1e8), 0)


def table_rows(geometry: Geometry, i: int, rows: slice) -> Int[Tensor, " pairs"]:
    """Which row of `Split.bins` each pair of a block selects."""
    size = geometry.num_bins + 1
    index = _bin(geometry.positions[i], rows, geometry.num_bins) * size
    index += _bin(geometry.positions_sc[i], rows, geometry.num_bins)
    if geometry.chain is not None:
        index += (geometry.chain[i, rows, None] == geometry.chain[i]) * (size * size)
    return index.flatten()


class Hidden(NamedTuple):
    """What a block passes through, [rows * n, cz]: both hidden layers after their ReLU, and the last layer's output."""

    first: Tensor
    second: Tensor
    last: Tensor


def hidden_rows(parts: Split, index: Int[Tensor, " pairs"], i: int, rows: slice, scratch: Scratch) -> Hidden:
    """The perceptron for a block."""
    n, cz = parts.first_j.shape[1:]
    pairs, dtype = index.shape[0], parts.weight_2.dtype
    # The four addends and their sum are as wide as the parts: 16 bits would round each of them.
    taken = scratch.take("first", pairs, cz, dtype=parts.bins.dtype)
    first = torch.index_select(parts.bins, 0, index, out=taken).view(-1, n, cz)
    first += parts.first_i[i, rows, None]
    first += parts.first_j[i]
    for row, of_row in zip(range(rows.start, rows.stop), first, strict=True):
        # The distances of a row to all keys stand one after the other in the table, from n - 1 - row on.
        of_row += parts.relpos[n - 1 - row : 2 * n - 1 - row]
    flat = relu_(first.view(-1, cz))
    if flat.dtype is not dtype:
        flat = scratch.take("rounded", pairs, cz).copy_(flat)
    second = relu_(torch.addmm(parts.bias_2, flat, parts.weight_2.t(), out=scratch.take("second", pairs, cz)))
    last = torch.addmm(parts.bias_3, second, parts.weight_3.t(), out=scratch.take("last", pairs, cz))
    return Hidden(flat, second, last)


def forward_rows(
    parts: Split,
    geometry: Geometry,
    i: int,
    rows: slice,
    mask: Bool[Tensor, " n"] | None,
    eps: float,
    scratch: Scratch,
) -> Float[Tensor, "rows n cz"]:
    """The pair representation of a block; a pair with a masked residue is zero."""
    last = hidden_rows(parts, table_rows(geometry, i, rows), i, rows, scratch).last
    return layer_norm_rows(last, parts.norm_weight, parts.norm_bias, rows, mask, eps)


def backward_rows(
    parts: Split,
    gradients: Split,
    geometry: Geometry,
    i: int,
    rows: slice,
    d_out: Float[Tensor, "rows n cz"],
    mask: Bool[Tensor, " n"] | None,
    eps: float,
    scratch: Scratch,
) -> None:
    """Add a block's share to `gradients`, computing the hidden layers again."""
    n, cz = parts.first_j.shape[1:]
    wide = gradients.weight_2.dtype
    index = table_rows(geometry, i, rows)
    hidden = hidden_rows(parts, index, i, rows, scratch)
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
    gradients.bias_3.add_(d_last.sum(0, dtype=wide))
    accumulate_(gradients.weight_3, d_last.t(), hidden.second)
    d_second = torch.mm(d_last, parts.weight_3, out=scratch.take("d_second", *hidden.second.shape))
    relu_backward_(d_second, hidden.second)
    gradients.bias_2.add_(d_second.sum(0, dtype=wide))
    accumulate_(gradients.weight_2, d_second.t(), hidden.first)
    d_first = relu_backward_(torch.mm(d_second, parts.weight_2, out=hidden.second), hidden.first)

    gradients.bins.index_add_(0, index, d_first.to(wide))
    by_pair = d_first.view(-1, n, cz)
    gradients.first_i[i, rows] = by_pair.sum(1, dtype=wide)
    gradients.first_j[i].add_(by_pair.sum(0, dtype=wide))
    for row, of_row in zip(range(rows.start, rows.stop), by_pair, strict=True):
        gradients.relpos[n - 1 - row : 2 * n - 1 - row].add_(of_row)
