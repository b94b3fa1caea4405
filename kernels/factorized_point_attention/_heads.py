"""Factorised point attention over a few heads of one batch item, forward and backward, in blocks of query rows.

Lifted queries, keys and values exist for these heads only, and logits for one block: beside its inputs and its outputs,
a pass holds less than a tenth of what all heads' lifted tensors would take.
"""

from collections.abc import Iterator
from math import sqrt
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..common.blocking import Scratch, pairs_per_block, slices
from ._lifting import NEVER, query_width, value_width

# On a CPU two megabytes a thread; half of it runs as fast, and so does the double.
_LOGITS_PER_PAIR = 256


class Inputs(NamedTuple):
    """What the streamed operator is given. Zero columns stand for factors that there are none of."""

    q: Float[Tensor, "b n h c"]
    k: Float[Tensor, "b n h c"]
    v: Float[Tensor, "b n h c"]
    q_points: Float[Tensor, "b n h p3"]
    k_points: Float[Tensor, "b n h p3"]
    v_points: Float[Tensor, "b n h pv3"]
    weights: Float[Tensor, " h"]
    b1: Float[Tensor, "b n h r"]
    b2: Float[Tensor, "b n h r"]
    z2: Float[Tensor, "b n rcp"]
    centre: Float[Tensor, "b 3"]
    mask: Tensor | None


class Columns(NamedTuple):
    """Where what stands in a lifted query or key, and in a lifted value."""

    scalars: slice
    points: slice
    norm: slice
    bias: slice
    of_points: slice
    of_pairs: slice
    query: int
    value: int

    @classmethod
    def of(cls, x: Inputs) -> "Columns":
        c, p, pv, r, rcp = (y.shape[-1] for y in (x.q, x.q_points, x.v_points, x.b1, x.z2))
        query = query_width(c, p // 3, r, precise=True, narrow=False)
        value = value_width(c, pv // 3, 1, rcp)
        ends = (slice(0, c), slice(c, c + p), slice(c + p, c + p + 1), slice(c + p + 1, query))
        return cls(*ends, slice(c, c + pv), slice(c + pv, value), query, value)


def head_groups(x: Inputs) -> Iterator[tuple[int, slice]]:
    """The batch items, and the heads of each that are attended together: few where the sequence is long."""
    b, n, h, _ = x.q.shape
    heads = max(1, min(h, pairs_per_block(x.q_points) * _LOGITS_PER_PAIR // max(n * n, 1)))
    for item in range(b):
        for some in slices(h, heads):
            yield item, some


class Heads:
    """The lifted queries, keys and values of some heads, and the attention weights of a block of their rows.

    Args:
        x: The operator's inputs.
        scratch: Memory that all heads use again.
    """

    def __init__(self, x: Inputs, scratch: Scratch) -> None:
        self.x, self.scratch, self.at = x, scratch, Columns.of(x)
        self.scale = sqrt(1 / (3 * x.q.shape[-1]))

    def lift(self, item: int, some: slice) -> None:
        """Write the lifted tensors of `some` heads."""
        x, at, n = self.x, self.at, self.x.q.shape[1]
        g = some.stop - some.start
        self.item, self.some = item, some
        self.gone = None if x.mask is None else ~x.mask[item][:, None]
        self.weight = x.weights[some, None, None]
        self.q, self.k = (self.scratch.take(name, g, n, at.query) for name in ("q", "k"))
        self.v = self.scratch.take("v", g, n, at.value)
        torch.mul(self.heads_of(x.q).to(self.q.dtype), self.scale, out=self.q[..., at.scalars])
        self.k[..., at.scalars].copy_(self.heads_of(x.k))
        self.v[..., at.scalars].copy_(self.heads_of(x.v))
        self.q[..., at.bias].copy_(self.heads_of(x.b1))
        self.k[..., at.bias].copy_(self.heads_of(x.b2))
        self.v[..., at.of_pairs].copy_(x.z2[item])
        centred = ((self.q, x.q_points, at.points), (self.k, x.k_points, at.points), (self.v, x.v_points, at.of_points))
        for lifted, points, where in centred:
            # Not `torch.sub(out=)`: a slice of columns cannot be seen as points without a copy.
            lifted[..., where] = self.heads_of(points)
            lifted[..., where].unflatten(-1, (-1, 3)).sub_(x.centre[item])
        self.q[..., at.norm] = 1.0
        if self.gone is not None:
            # A masked residue may hold anything.
            for lifted in (self.q, self.k, self.v):
                lifted.masked_fill_(self.gone, 0.0)
        self.squares = self.k[..., at.points].square().sum(-1, keepdim=True)
        self.k[..., at.norm] = -0.5 * self.weight * self.squares
        self.q[..., at.points] *= self.weight
        if self.gone is not None:
            self.k[..., at.norm].masked_fill_(self.gone, NEVER)

    def heads_of(self, x: Float[Tensor, "b n h d"]) -> Float[Tensor, "g n d"]:
        """The part of an input that belongs to these heads."""
        return x[self.item, :, self.some].transpose(0, 1)

    def blocks(self) -> Iterator[slice]:
        """Query rows whose logits are held at once."""
        n = self.q.shape[1]
        rows = pairs_per_block(self.x.q_points) * _LOGITS_PER_PAIR // max(self.q.shape[0] * n, 1)
        return slices(n, max(1, rows))

    def attend(self, rows: slice) -> Float[Tensor, "g rows n"]:
        """The attention weights of a block."""
        g, n, _ = self.q.shape
        logits = self.scratch.take("weights", g, rows.stop - rows.start, n)
        torch.bmm(self.q[:, rows], self.k.transpose(1, 2), out=logits)
        return torch.softmax(logits, -1, out=logits)


class Gradients(Heads):
    """The same, and the gradients of the lifted tensors.

    Args:
        d_out: Of the attended scalars [b, n, h, c].
        d_points: Of the attended points [b, n, h, 3pv].
        d_pairs: Of the attended factors [b, n, h, r cp].
        x: The operator's inputs.
        scratch: Memory that all heads use again.
    """

    def __init__(self, d_out: Tensor, d_points: Tensor, d_pairs: Tensor, x: Inputs, scratch: Scratch) -> None:
        super().__init__(x, scratch)
        self.asked = (d_out, d_points, d_pairs)

    def lift(self, item: int, some: slice) -> None:
        """Also write what the values are asked for, and set the sums to zero."""
        super().lift(item, some)
        self.d_q, self.d_k, self.d_v, self.d_out = (
            self.scratch.take(f"d_{name}", *x.shape)
            for name, x in (("q", self.q), ("k", self.k), ("v", self.v), ("out", self.v))
        )
        self.d_k.zero_()
        self.d_v.zero_()
        for asked, where in zip(self.asked, (self.at.scalars, self.at.of_points, self.at.of_pairs), strict=True):
            self.d_out[..., where] = self.heads_of(asked)
        if self.gone is not None:
            # A query that is not there passes no gradient, whatever arrives at its zeros.
            self.d_out.masked_fill_(self.gone, 0.0)

    def add(self, rows: slice) -> None:
        """Add a block's share. Five products a logit: the weights are computed again."""
        q, d_out, weights = self.q[:, rows], self.d_out[:, rows], self.attend(rows)
        d_logits = self.scratch.take("d_logits", *weights.shape)
        torch.bmm(d_out, self.v.transpose(1, 2), out=d_logits)
        self.d_v.baddbmm_(weights.transpose(1, 2), d_out)
        torch.ops.aten._softmax_backward_data(d_logits, weights, -1, weights.dtype, grad_input=d_logits)
        self.d_q[:, rows] = torch.bmm(d_logits, self.k)
        self.d_k.baddbmm_(d_logits.transpose(1, 2), q)

    def write(self, into: Inputs) -> None:
        """Take the lifted gradients apart; those of the factors that heads share are added."""
        at, item = self.at, self.item
        if self.gone is not None:
            for gradient in (self.d_q, self.d_k, self.d_v):
                gradient.masked_fill_(self.gone, 0.0)
        k_points, d_norm = self.k[..., at.points], self.d_k[..., at.norm]
        # Of the points without their weight, which may be zero.
        q_points = self.heads_of(self.x.q_points).unflatten(-1, (-1, 3)).sub(self.x.centre[item]).flatten(-2)
        if self.gone is not None:
            q_points.masked_fill_(self.gone, 0.0)
        of_products = (self.d_q[..., at.points] * q_points).sum((1, 2))
        into.weights[self.some] += of_products - 0.5 * (d_norm * self.squares).sum((1, 2))
        self.heads_of(into.q).copy_(self.d_q[..., at.scalars].mul_(self.scale))
        self.heads_of(into.k).copy_(self.d_k[..., at.scalars])
        self.heads_of(into.v).copy_(self.d_v[..., at.scalars])
        self.heads_of(into.q_points).copy_(self.d_q[..., at.points].mul_(self.weight))
        self.heads_of(into.k_points).copy_(
            self.d_k[..., at.points].addcmul_(d_norm * self.weight, k_points, value=-1.0)
        )
        self.heads_of(into.v_points).copy_(self.d_v[..., at.of_points])
        self.heads_of(into.b1).copy_(self.d_q[..., at.bias])
        self.heads_of(into.b2).copy_(self.d_k[..., at.bias])
        into.z2[item] += self.d_v[..., at.of_pairs].sum(0)
