"""Invariant point attention through cuEquivariance's triangle attention: lifted queries and keys, one row, a bias.

NVIDIA's library has no IPA. Lifted (`_lifting.py`), a logit is an inner product and z's share of it a bias, which its
triangle attention takes for one row; values and points come back side by side. The mean of z comes from a second pass
over blocks of query rows, which makes the logits again: a block holds whole rows, so that their softmax costs nothing
beside reading z, and nothing hangs on the library's log-sum-exp, of which its documentation tells the type only.

The library's backward pass knows nothing of that mean, and drops the gradient of its log-sum-exp. So both passes stand
in one `autograd.Function`: the logits' gradient is the library's, which comes back in float32 as its bias's, plus the
second pass's, before it goes on to queries, keys and z.
"""

from dataclasses import replace
from math import sqrt
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from ..common.blocking import block_dtype, row_blocks
from ..common.cuequivariance_limits import ATTENTION_THRESHOLDS, NEEDS, against_attention, check_backward
from ..common.matmul import add_product_
from ..dtypes import any_requires_grad
from ..factorized_point_attention._lifting import lift, query_width, split_values, value_width
from ..hardware.machine import imported
from ..registry import register
from ..registry.types import Dims, KernelFunction, Reason, Request
from ._rows import NEVER

library: ModuleType

#: By whether numbers have 16 bits: the widest head, and what its width is a multiple of.
WIDEST, STEP = {True: 128, False: 32}, {True: 8, False: 4}


def columns(c: int, p: int, pv: int, *, narrow: bool) -> int:
    """The width of a lifted head: the library wants one for queries, keys and values."""
    width = max(query_width(c, p, 0, precise=True, narrow=narrow), value_width(c, pv, 0, 0))
    return -(-width // STEP[narrow]) * STEP[narrow]


def supports(request: Request) -> list[Reason]:
    """Every reason against `request`."""
    dims, narrow = request.dims, request.dtype in (torch.bfloat16, torch.float16)
    width, widest = columns(dims["c"], dims["p"], dims["pv"], narrow=narrow), WIDEST[narrow]
    asked = Dims({"m": dims["n"], "d": min(width, widest)})
    reasons = against_attention(replace(request, dims=asked))
    if width > widest:
        sizes, bits = f"c={dims['c']} p={dims['p']} pv={dims['pv']}", 16 if narrow else 32
        fix = "use kernel 'torch'" if narrow else "use bfloat16, or kernel 'torch'"
        reasons.append(
            Reason(f"{sizes} make lifted heads of {width} columns; with {bits} bits cuEquivariance takes {widest}", fix)
        )
    if "logit_dropout" in request.options:
        reasons.append(Reason("it cannot drop logits", "use kernel 'reference', or set the IPA's dropout to 0"))
    if request.compiled:
        reasons.append(Reason("Dynamo cannot trace a backward pass that calls the library's", "use kernel 'torch'"))
    return reasons


def run(
    q: Float[Tensor, "b n h c"],
    k: Float[Tensor, "b n h c"],
    v: Float[Tensor, "b n h c"],
    q_points: Float[Tensor, "b n h p 3"],
    k_points: Float[Tensor, "b n h p 3"],
    v_points: Float[Tensor, "b n h pv 3"],
    point_weights: Float[Tensor, " h"],
    z: Float[Tensor, "b n n cz"],
    bias_weight: Float[Tensor, "h cz"],
    mask: Bool[Tensor, "b n"],
    pair_mask: Bool[Tensor, "b n n"] | None = None,
    logit_bias: Float[Tensor, " h"] | None = None,
    keep: None = None,
) -> tuple[Float[Tensor, "b n h c"], Float[Tensor, "b n h pv 3"], Float[Tensor, "b n h cz"]]:
    """Lift, attend, and take the values apart again."""
    check_backward(q.dtype, any_requires_grad(q, k, v, q_points, k_points, v_points, point_weights, z, bias_weight))
    lifted = lift(q, k, v, q_points, k_points, v_points, point_weights, None, None, mask, True, q.dtype)
    width = columns(q.shape[-1], q_points.shape[-2], v_points.shape[-2], narrow=q.dtype.itemsize == 2)
    wide = (pad(x, (0, width - x.shape[-1])).transpose(1, 2).contiguous() for x in (lifted.q, lifted.k, lifted.v))
    there = mask if pair_mask is None else mask & (pair_mask & mask[:, None]).any(-1)
    out, pair = _Attention.apply(*wide, z, bias_weight, mask, there, pair_mask)
    out = out[..., : lifted.v.shape[-1]].transpose(1, 2)
    values, points, _ = split_values(out, lifted.centre, v, v_points, None, there)
    return values, points, pair.to(q.dtype)


class _Attention(torch.autograd.Function):
    """Both passes: q, k and v are lifted [b, h, n, d]; gives the attended values [b, h, n, d] and z [b, n, h, cz]."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        z: Tensor,
        bias_weight: Tensor,
        mask: Tensor,
        there: Tensor,
        pair_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        bias = _bias(z, bias_weight, pair_mask)
        out = _attend(q, k, v, bias, mask).masked_fill(~there[:, None, :, None], 0.0)
        dtype = block_dtype(z)
        pair = z.new_empty(*z.shape[:2], q.shape[1], z.shape[-1])
        for i, rows in row_blocks(z):
            weights = _weights(q, k, bias, i, rows)
            block = torch.bmm(weights.transpose(0, 1).to(dtype), z[i, rows].to(dtype))
            pair[i, rows] = block.masked_fill_(~there[i, rows, None, None], 0.0).to(z.dtype)
        ctx.save_for_backward(q, k, v, z, bias_weight, mask, there, pair_mask)
        return out, pair

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_pair: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, z, bias_weight, mask, there, pair_mask = ctx.saved_tensors
        dtype, n = block_dtype(z), z.shape[1]
        # A query that is not there passes no gradient, whatever arrives at its zeros.
        d_out = d_out.masked_fill(~there[:, None, :, None], 0.0)
        d_pair = d_pair.masked_fill(~there[:, :, None, None], 0.0)
        bias = _bias(z, bias_weight, pair_mask)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (v, bias)]
            attended = _attend(q, k, leaves[0], leaves[1], mask)
            dv, d_logits = torch.autograd.grad(attended, leaves, d_out.to(attended.dtype))
        dq, dk = torch.empty_like(q, dtype=torch.float32), torch.zeros_like(k, dtype=torch.float32)
        dz = torch.empty_like(z, memory_format=torch.contiguous_format)
        weight = _scaled(bias_weight, dtype)
        d_weight = torch.zeros_like(bias_weight, dtype=torch.float32)
        for i, rows in row_blocks(z):
            z_rows, d_rows = z[i, rows].to(dtype), d_pair[i, rows].to(dtype)
            weights = _weights(q, k, bias, i, rows)
            # dL = a (dA - sum_j a dA), of the mean of z alone; it is linear in dA, and the library's part is there.
            of_pair = torch.bmm(d_rows, z_rows.transpose(1, 2)).float().transpose(0, 1)
            of_both = d_logits[i, :, rows] + weights * (of_pair - (weights * of_pair).sum(-1, keepdim=True))
            dq[i, :, rows] = torch.bmm(of_both, k[i].float())
            add_product_(dk[i], of_both.transpose(1, 2), q[i, :, rows].float())
            left = torch.cat([of_both, weights]).transpose(0, 1).to(dtype)
            d_weight += torch.bmm(left[:, : weight.shape[0]], z_rows).sum(0, dtype=torch.float32)
            # The logits' and the mean's share of z's gradient in one product: [dL | a] @ [W_b ; d_pair].
            right = torch.cat([weight.expand(len(d_rows), -1, -1), d_rows], 1)
            dz[i, rows] = torch.bmm(left.transpose(1, 2), right).view(-1, n, z.shape[-1]).to(z.dtype)
        d_weight = (sqrt(1 / 3) * d_weight).to(bias_weight.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv, dz, d_weight, None, None, None


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Bool[Tensor, "b n"]) -> Tensor:
    """The library's attention with one row; an item without keys gets all of them, and loses the result again."""
    keys = (mask | ~mask.any(-1, keepdim=True))[:, None, None, None]
    row = (x[:, None] for x in (q, k, v, bias))
    out: Tensor = library.triangle_attention(*row, mask=keys, scale=1.0, return_aux=False)
    return out[:, 0]


def _scaled(bias_weight: Tensor, dtype: torch.dtype) -> Tensor:
    return (sqrt(1 / 3) * bias_weight.float()).to(dtype)


def _bias(z: Tensor, bias_weight: Tensor, pair_mask: Tensor | None) -> Float[Tensor, "b h n n"]:
    """The share of z in the logits, in float32, block by block."""
    b, n = z.shape[:2]
    dtype = block_dtype(z)
    weight = _scaled(bias_weight, dtype)
    bias = torch.empty(b, weight.shape[0], n, n, dtype=torch.float32, device=z.device)
    for i, rows in row_blocks(z):
        block = torch.matmul(weight, z[i, rows].to(dtype).transpose(1, 2)).float()
        if pair_mask is not None:
            block.masked_fill_(~pair_mask[i, rows, None], NEVER)
        bias[i, :, rows] = block.transpose(0, 1)
    return bias


def _weights(q: Tensor, k: Tensor, bias: Tensor, i: int, rows: slice) -> Float[Tensor, "h rows n"]:
    """The attention weights of a block, in float32: a product of 16-bit numbers would be rounded to 16 bits.

    Masked keys hold a norm that no logit can win with.
    """
    return torch.baddbmm(bias[i, :, rows], q[i, :, rows].float(), k[i].float().transpose(1, 2)).softmax(-1)


def load() -> KernelFunction:
    global library
    library = imported("cuequivariance_torch", having="triangle_attention")
    return run


register(
    operation="invariant_point_attention",
    name="cuequivariance",
    needs=NEEDS,
    supports=supports,
    load=load,
    # It does not say how it sums the bias's gradient.
    deterministic=False,
    thresholds=ATTENTION_THRESHOLDS,
)
