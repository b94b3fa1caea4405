"""Invariant point attention over one block of query rows: the pieces that the streamed kernels are made of.

Queries and keys are lifted: scalars, points and norms side by side, so that one inner product gives the scalar and the
point part of the logits. Everything that is constant over the keys is left out, because the softmax removes it.
"""

from math import sqrt
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..common.matmul import add_product_, product_in, write_product
from ..dtypes import widest

#: A logit that no key can win with. Finite, so that a row without any keys stays finite until it is set to zero.
NEVER = -1e30
#: The pair representation's share of the logits, of three terms that enter with equal variance.
_BIAS_SCALE = sqrt(1 / 3)


class Lifted(NamedTuple):
    """Queries, keys and values of all heads: [b, h, n, c + 3p + 1] twice, and [b, h, n, c + 3pv]."""

    q: Tensor
    k: Tensor
    v: Tensor
    centre: Tensor


def lift(
    q: Float[Tensor, "b n h c"],
    k: Float[Tensor, "b n h c"],
    v: Float[Tensor, "b n h c"],
    q_points: Float[Tensor, "b n h p 3"],
    k_points: Float[Tensor, "b n h p 3"],
    v_points: Float[Tensor, "b n h pv 3"],
    point_weights: Float[Tensor, " h"],
    mask: Bool[Tensor, "b n"],
) -> Lifted:
    """Write logits as inner products: -w/2 |qp - kp|^2 is w qp.kp - w/2 |kp|^2, up to what the softmax removes.

    Points are taken from the centre of the residues that are there: the two terms are large and cancel, the more so the
    further the protein is from the origin.
    """
    dtype = widest(q, q_points)
    c, p = q.shape[-1], q_points.shape[-2]
    there = mask[:, :, None, None, None].to(dtype)
    count = there.sum(1, keepdim=True).clamp(min=1.0)
    centre = ((k_points.to(dtype) * there).sum(1, keepdim=True) / count).mean((2, 3), keepdim=True).detach()
    q_points, k_points, v_points = (x.to(dtype) - centre for x in (q_points, k_points, v_points))
    weight = sqrt(2 / (27 * p)) * point_weights.to(dtype)[:, None]
    norm = -0.5 * weight * k_points.flatten(-2).square().sum(-1, keepdim=True)
    lifted_q = torch.cat(
        [q.to(dtype) * sqrt(1 / (3 * c)), (weight[..., None] * q_points).flatten(-2), torch.ones_like(norm)], dim=-1
    )
    lifted_k = torch.cat([k.to(dtype), k_points.flatten(-2), norm.masked_fill(~mask[:, :, None, None], NEVER)], dim=-1)
    lifted_v = torch.cat([v.to(dtype), v_points.flatten(-2)], dim=-1)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (lifted_q, lifted_k, lifted_v))
    return Lifted(q, k, v, centre)


class Forward:
    """A forward pass over all blocks, of all heads: give it each block of z, then take `out` and `pair`.

    Args:
        q: Lifted queries [b, h, n, d].
        k: Lifted keys [b, h, n, d].
        v: Lifted values [b, h, n, dv].
        bias_weight: [h, cz].
        there: [b, n], False for queries that get zeros.
        pair_mask: [b, n, n], or None.
        dtype: The type in which blocks of z are multiplied.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias_weight: Tensor,
        there: Tensor,
        pair_mask: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        b, h, n, _ = q.shape
        self.q, self.v, self.there, self.pair_mask = q, v, there, pair_mask
        self.k_transposed = k.transpose(2, 3).contiguous()
        # In 16 bits the scaled weight would be rounded once more: there the product is scaled.
        narrow = dtype is not q.dtype
        self.weight = bias_weight.to(dtype) if narrow else _BIAS_SCALE * bias_weight.to(dtype)
        self.scale = _BIAS_SCALE if narrow else 1.0
        self.out = q.new_empty(b, h, n, v.shape[-1])
        self.pair = q.new_empty(b, n, h, bias_weight.shape[1])

    def attend(self, i: int, rows: slice, z: Float[Tensor, "rows n cz"]) -> Float[Tensor, "rows h n"]:
        """The attention weights of a block.

        Rows stand outermost: z's share of the logits is then one small product a row, added where the logits are.
        """
        q = self.q[i, :, rows]
        logits = q.new_empty(q.shape[1], q.shape[0], z.shape[1])
        write_product(q, self.k_transposed[i], logits.transpose(0, 1))
        add_product_(logits, self.weight.expand(z.shape[0], -1, -1), z.transpose(1, 2), self.scale)
        if self.pair_mask is not None:
            logits.masked_fill_(~self.pair_mask[i, rows, None], NEVER)
        return torch.softmax(logits, -1, out=logits)

    def block(self, i: int, rows: slice, z: Float[Tensor, "rows n cz"]) -> None:
        """Average the values and the pair representation over the keys."""
        attention = self.attend(i, rows, z)
        gone = ~self.there[i, rows]
        out, pair = self.out[i, :, rows], self.pair[i, rows]
        out.copy_(torch.bmm(attention.transpose(0, 1), self.v[i])).masked_fill_(gone[None, :, None], 0.0)
        pair.copy_(product_in(pair.dtype, attention.to(z.dtype), z)).masked_fill_(gone[:, None, None], 0.0)


class Backward(Forward):
    """A backward pass over all blocks: the attention is computed again. Arguments as `Forward`, after the gradients.

    Args:
        d_out: Gradient of `out`.
        d_pair: Gradient of `pair`.
    """

    def __init__(
        self,
        d_out: Tensor,
        d_pair: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias_weight: Tensor,
        there: Tensor,
        pair_mask: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(q, k, v, bias_weight, there, pair_mask, dtype)
        # A query that is not there passes no gradient, whatever arrives at its zeros.
        self.d_out = d_out.masked_fill(~there[:, None, :, None], 0.0)
        self.d_pair = d_pair.masked_fill(~there[:, :, None, None], 0.0)
        self.k, self.v_transposed = k, v.transpose(2, 3).contiguous()
        self.dq, self.dk, self.dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        self.scaled_weight = _BIAS_SCALE * bias_weight.to(q.dtype)
        self.d_weight = torch.zeros_like(bias_weight, dtype=q.dtype)

    def block_gradient(self, i: int, rows: slice, z: Float[Tensor, "rows n cz"]) -> Float[Tensor, "rows n cz"]:
        """The gradient of a block of z; the others are added up."""
        d_out, d_pair = self.d_out[i, :, rows], self.d_pair[i, rows]
        attention = self.attend(i, rows, z)
        # dL = a (dA - sum_j a dA), where dA collects what the values and the pair values ask for.
        d_logits = torch.empty_like(attention)
        write_product(d_out, self.v_transposed[i], d_logits.transpose(0, 1))
        add_product_(d_logits, d_pair.to(z.dtype), z.transpose(1, 2))
        d_logits -= (d_logits * attention).sum(-1, keepdim=True)
        d_logits *= attention

        by_head = d_logits.transpose(0, 1)
        self.dq[i, :, rows] = torch.bmm(by_head, self.k[i])
        add_product_(self.dk[i], by_head.transpose(1, 2), self.q[i, :, rows])
        add_product_(self.dv[i], attention.permute(1, 2, 0), d_out)
        self.d_weight += product_in(self.d_weight.dtype, d_logits.to(z.dtype), z).sum(0)
        # The logits' and the pair values' share of z's gradient in one product: [dL | a] @ [W_b ; dO].
        left = torch.cat([d_logits, attention], dim=1).to(z.dtype)
        right = torch.cat([self.scaled_weight.expand(z.shape[0], -1, -1), d_pair], dim=1).to(z.dtype)
        return torch.bmm(left.transpose(1, 2), right)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of q, k, v and bias_weight."""
        return self.dq, self.dk, self.dv, _BIAS_SCALE * self.d_weight
