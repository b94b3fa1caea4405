"""Invariant point attention in Triton, as custom operators: operands, launches, autograd. Imported by `load` only."""

from collections.abc import Callable
from contextlib import nullcontext
from math import sqrt
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ..common.double_backward import no_double_backward
from ..dtypes import without_autocast
from ..hardware import machine
from ..hardware.tf32 import allowed, as_remembered, remembering
from ..triton_tools import _language
from ..triton_tools._language import INTERPRETED
from ..triton_tools.tile_cache import TileCache, length_class, source_of
from . import _tma_launch, _tma_triton, _triton
from ._operands import LOG2E, power, up
from ._rows import NEVER
from ._tiles import Plan, plans_for, width
from ._triton import KERNELS

Result = TypeVar("Result")

_CHIP_OF_THE_INTERPRETER = (8, 0)


class Packed(NamedTuple):
    """Rows as a kernel reads them: [b, h, rows, terms, columns], and the number that each row was divided by."""

    terms: Tensor
    scale: Float[Tensor, "b h rows"]


def _terms(x: Float[Tensor, "b h rows d"], rows: int, halves: bool) -> Tensor:
    """Lay rows out for the kernel: padded with zeros, as float32, or as the sum of two numbers of 16 bits.

    Two terms of float16 hold a number of magnitude up to 1 to 2^-24.
    """
    b, h, given, d = x.shape
    out = x.new_zeros(b, h, rows, 2 if halves else 1, up(d), dtype=torch.float16 if halves else torch.float32)
    out[:, :, :given, 0, :d] = x
    if halves:
        out[:, :, :given, 1, :d] = x - out[:, :, :given, 0, :d].float()
    return out


class Call:
    """What both passes of a call have in common."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, z: Tensor, there: Tensor, pair_mask: Tensor | None, points: int
    ) -> None:
        self.points = points
        self.b, self.h, self.n, self.d = q.shape
        self.dv, self.cz = v.shape[-1], z.shape[-1]
        self.padded = up(self.n)
        self.z = z if z.stride(-1) == 1 or self.cz == 1 else z.contiguous()
        # What masked residues hold must not set the scale of the others.
        self.gone = k[..., -1:] <= NEVER / 2
        self.q = q.masked_fill(~there[:, None, :, None], 0.0)
        self.k, self.v = k[..., :-1].masked_fill(self.gone, 0.0), v.masked_fill(self.gone, 0.0)
        self.norm = k[..., -1]
        self.there, self.pair_mask = there.contiguous(), pair_mask
        self.mask = self.there if pair_mask is None else pair_mask
        self.halves = z.dtype is not torch.float32
        self.capability = machine.capability("cuda", q.device.index) if q.is_cuda else _CHIP_OF_THE_INTERPRETER
        if self.halves:
            self.precision = "ieee"
        else:  # PyTorch's own switch for float32 products
            self.precision = "tf32" if allowed() else "tf32x3"

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return 0 in (self.b, self.h, self.n)

    def planned(self, kernel: str, run: Callable[[Plan], Result]) -> Result:
        """Run a pass as the chip runs it best."""
        sizes = {"h": self.h, "cz": self.cz, "d": self.d - 1, "dv": self.dv, "points": self.points}
        plans = plans_for(self.capability, kernel, self.z.dtype, **sizes)
        if not _tma_launch.describable(self.z):
            plans = [plan for plan in plans if not plan.descriptors]
        words: dict[str, int | str] = {"kernel": kernel, "z": str(self.z.dtype), "precision": self.precision, **sizes}
        words |= {"b": length_class(self.b), "n": length_class(self.n)}
        return _TILES.run(words, plans, run, self.q.device)

    def parts(self, plan: Plan) -> tuple[int, int]:
        """In how many parts the keys are cut, so that a short batch fills a chip, and the blocks of keys in each.

        By the sizes alone: results do not depend on how many processors a chip has.
        """
        blocks = -(-self.n // plan.keys)
        rows = self.b * -(-self.n // plan.queries)
        parts = max(1, min(blocks // _FEWEST_BLOCKS, _PROGRAMS // rows))
        each = -(-blocks // parts)
        return -(-blocks // each), each

    def head_width(self, plan: Plan) -> int:
        return max(plan.heads, width(self.h, 1))

    def queries(self) -> Packed:
        """Queries, all but the ones that multiply the keys' norms; in base 2."""
        q = self.q[..., :-1]
        if not self.halves:
            return Packed(_terms(q * LOG2E, self.n, False), q.new_ones(q.shape[:-1]))
        q = q * self.key_scale()
        scale = power(q, -1)
        return Packed(_terms(q / scale, self.n, True), (scale[..., 0] * LOG2E).contiguous())

    def key_scale(self) -> Tensor:
        return power(self.k, -2) if self.halves else self.k.new_ones(())

    def value_scale(self) -> Tensor:
        return power(self.v, -2) if self.halves else self.v.new_ones(())

    def keys(self) -> Tensor:
        return _terms(self.k / self.key_scale(), self.padded, self.halves)

    def values(self) -> Tensor:
        return _terms(self.v / self.value_scale(), self.padded, self.halves)

    def key_bias(self) -> Float[Tensor, "b h padded"]:
        """What a key adds to all its logits, in base 2."""
        out = self.norm.new_full((self.b, self.h, self.padded), NEVER)
        out[..., : self.n] = (self.norm * LOG2E).clamp(min=NEVER)
        return out

    def logits(self) -> Float[Tensor, "b h n padded"]:
        """The scalar and point part of the logits, in memory."""
        return self.of_pairs(self.queries_and_ones(), torch.cat([self.k, self.norm[..., None]], -1))

    def of_pairs(self, queries: Tensor, keys: Tensor) -> Float[Tensor, "b h n padded"]:
        """All inner products; zeros beyond the keys."""
        out = queries.new_empty(self.b, self.h, self.n, self.padded)
        out[..., self.n :] = 0.0
        transposed = keys.flatten(0, 1).transpose(1, 2)
        torch.bmm(queries.flatten(0, 1), transposed, out=out.flatten(0, 1)[..., : self.n])
        return out

    def queries_and_ones(self) -> Float[Tensor, "b h n d"]:
        """Lifted queries as they were given, where they are there."""
        out = self.q.clone()
        out[..., -1] = 1.0
        return out

    def launch(self, kernel: str, plan: Plan, programs: int, *arguments: Any) -> None:
        """Run a kernel as planned. A device without a number (the interpreter's CPU) needs no guard."""
        strides = (*self.z.stride()[:3], *(self.mask.stride() if self.pair_mask is not None else (0, 0, 0)))
        _, each = self.parts(plan)
        d, dv = up(self.d - 1), up(self.dv)
        with torch.cuda.device(self.q.device) if self.q.is_cuda else nullcontext():
            KERNELS[kernel][(programs,)](
                *arguments,
                *strides,
                self.b, self.n, self.padded, each,
                H=self.h, HW=self.head_width(plan), CZ=self.cz, CZW=width(self.cz) // plan.chunks,
                D=d, DW=width(d), DV=dv, DVW=width(dv),
                I=plan.queries, J=plan.keys, TERMS=2 if self.halves else 1,
                CHUNKS=plan.chunks, NEVER=NEVER,
                FUSED=plan.fused, MASKED=self.pair_mask is not None,
                PRECISION=self.precision, INTERPRETED=INTERPRETED,
                num_warps=plan.warps, num_stages=plan.stages,
            )  # fmt: skip


_FEWEST_BLOCKS = 4  # of keys in a part: fewer would not pay for adding the parts up
_PROGRAMS = 384  # a few for each processor of the largest chips
_TILES = TileCache("invariant_point_attention", source_of(_triton, _tma_triton, _language), OutOfResources)


def _outputs(q: Tensor, v: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, h, n, _ = q.shape
    return q.new_empty(b, h, n, v.shape[-1]), q.new_empty(b, n, h, z.shape[-1]), q.new_empty(b, h, n)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, z: Tensor, bias_weight: Tensor, there: Tensor, pair_mask: Tensor | None,
    points: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call = Call(q, k, v, z, there, pair_mask, points)
    if call.empty:
        out, pair, lse = _outputs(q, v, z)
        return out.zero_(), pair.zero_(), lse.fill_(torch.inf)
    return call.planned("forward", lambda plan: _forward_as(plan, call, bias_weight))


def _forward_as(plan: Plan, call: Call, bias_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    parts, _ = call.parts(plan)
    weight = bias_weight.new_zeros(call.cz, call.head_width(plan), dtype=call.z.dtype)
    weight[:, : call.h] = bias_weight.t()
    pairs = call.q.new_empty(parts, call.b, call.n, call.h, call.cz)
    lses = call.q.new_empty(parts, call.b, call.h, call.n)
    logits = outs = lses  # in the place of what is not there
    if plan.descriptors:
        outs = _tma_launch.forward(call, plan, weight, pairs, lses)
    else:
        operands = (lses,) * 5
        if plan.fused:
            queries, scale = call.queries()
            values = call.values()
            operands = (queries, scale, call.keys(), call.key_bias(), values)
            outs = lses.new_empty(*lses.shape, values.shape[-1])
        else:
            logits = call.logits()
        programs = parts * call.b * -(-call.n // plan.queries)
        call.launch(
            "forward", plan, programs, call.z, weight, *operands, logits, call.mask, call.there, outs, pairs, lses
        )
    lse, shares = _joined(lses, call.there)
    pair = (pairs * shares.transpose(2, 3)[..., None]).sum(0) if parts > 1 else pairs[0]
    if not plan.fused:
        weights = logits[..., : call.n].sub_(lse[..., None]).exp2_()
        return weights @ call.v, pair, lse
    out = (outs * shares[..., None]).sum(0) if parts > 1 else outs[0]
    return out[..., : call.dv] * call.value_scale(), pair, lse


def _joined(lses: Float[Tensor, "parts b h n"], there: Tensor) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of all parts, and each part's share of the weights."""
    if len(lses) == 1:
        return lses[0], lses
    top = lses.amax(0)
    gone = ~there[:, None]
    shares = torch.exp2((lses - top).masked_fill(gone, 0.0))
    total = shares.sum(0)
    return top + torch.log2(total), shares / total


def _matrix_product(a: Tensor, x: Tensor) -> Float[Tensor, "b h m d"]:
    """A @ x in float32: with a in 16 bits, on matrix units, x as the sum of two numbers of 16 bits."""
    if a.dtype is torch.float32:
        return a @ x
    d = x.shape[-1]
    scale = power(x, -2) if a.dtype is torch.float16 else x.new_ones(())
    x = x / scale
    high = x.to(a.dtype)
    two = torch.cat([high, (x - high.float()).to(a.dtype)], -1)
    if a.is_cuda and _BMM_TAKES_OUT_DTYPE:
        found = torch.bmm(a.flatten(0, 1), two.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])
    else:
        found = a.float() @ two.float()
    return (found[..., :d] + found[..., d:]) * scale


_BMM_TAKES_OUT_DTYPE = hasattr(torch.ops.aten.bmm, "dtype")


def _backward(
    d_out: Tensor, d_pair: Tensor, q: Tensor, k: Tensor, v: Tensor, z: Tensor, bias_weight: Tensor, there: Tensor,
    pair_mask: Tensor | None, points: int, out: Tensor, pair: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = Call(q, k, v, z, there, pair_mask, points)
    if call.empty:
        d_q, d_k, d_v, d_z, d_weight = (torch.zeros_like(x) for x in (q, k, v, z, bias_weight))
        return d_q, d_k, d_v, d_z.contiguous(), d_weight
    # A query that is not there passes no gradient, whatever arrives at its zeros.
    d_out = d_out.masked_fill(~there[:, None, :, None], 0.0)
    d_pair = d_pair.masked_fill(~there[:, :, None, None], 0.0)
    given = (call, d_out, d_pair, bias_weight, out, pair, lse.contiguous())
    return call.planned("backward", lambda plan: _backward_as(plan, *given))


def _backward_as(
    plan: Plan, call: Call, d_out: Tensor, d_pair: Tensor, bias_weight: Tensor, out: Tensor, pair: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, z = call.q, call.z
    wide = call.head_width(plan)
    joined = z.new_zeros(call.b, call.n, wide, 2, call.cz)
    joined[:, :, : call.h, 0], joined[:, :, : call.h, 1] = bias_weight.to(z.dtype), d_pair
    delta = ((d_out * out).sum(-1) + (d_pair * pair).sum(-1).transpose(1, 2)).contiguous()
    # Weights are at most 1; their gradients may be too small for float16.
    stored = (torch.float16, torch.bfloat16) if call.halves else (torch.float32,) * 2
    weights, d_logits = (q.new_empty(call.b, call.h, call.n, call.padded, dtype=dtype) for dtype in stored)
    nothing = delta
    operands: tuple[Tensor, ...]
    if plan.fused:
        queries, scale = call.queries()
        asked = d_out * call.value_scale()
        asked_scale = power(asked, -1) if call.halves else torch.ones_like(asked[..., :1])
        asked = _terms(asked / asked_scale, call.n, call.halves)
        asked_scale = asked_scale.contiguous()
        operands = (queries, scale, call.keys(), call.key_bias(), asked, asked_scale, call.values(), nothing, nothing)
    else:
        operands = (*(nothing,) * 7, call.logits(), call.of_pairs(d_out, call.v))
    parts, _ = call.parts(plan)
    programs = parts * call.b * -(-call.n // plan.queries)
    d_weight = q.new_empty(programs, wide, call.cz)
    d_z = torch.empty_like(z, memory_format=torch.contiguous_format)
    excess = lse.new_empty(parts, *lse.shape)
    results = (d_z, weights, d_logits, d_weight, excess)
    call.launch("backward", plan, programs, z, joined, *operands, call.mask, lse, delta, *results)
    del operands
    # The rest, in matrix products. A query's d_logits should add up to zero. What `delta`, made of rounded outputs,
    # left over is taken off in proportion to the weights, as an exact one would have: excess * weights.
    over = excess.sum(0)
    ones = call.queries_and_ones()  # whose last column gives the gradient of the keys' norms
    weights, d_logits = weights[..., : call.n], d_logits[..., : call.n]
    of_keys = _matrix_product(weights.transpose(-1, -2), torch.cat([d_out, ones * over[..., None]], -1))
    d_v = of_keys[..., : call.dv].contiguous()
    d_k = _matrix_product(d_logits.transpose(-1, -2), ones) - of_keys[..., call.dv :]
    # The same of the queries, with the sum as d_logits were stored: however far the keys are from the origin.
    found = _matrix_product(d_logits, torch.cat([call.k, torch.ones_like(call.k[..., :1])], -1))
    d_q = torch.zeros_like(q)
    d_q[..., :-1] = found[..., :-1] - found[..., -1:] * _matrix_product(weights, call.k)
    of_weight = d_weight.sum(0)[: call.h] - sqrt(1 / 3) * (over.transpose(1, 2)[..., None] * pair).sum((0, 1))
    return d_q, d_k, d_v, d_z, of_weight.to(bias_weight.dtype)


@torch.library.custom_op("foldkernels::ipa_triton", mutates_args=())
def ipa_triton(
    q: Tensor, k: Tensor, v: Tensor, z: Tensor, bias_weight: Tensor, there: Tensor, pair_mask: Tensor | None,
    points: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attend with lifted q, k [b, h, n, d] and v [b, h, n, dv]; `there` [b, n] is False for queries that get zeros.

    Of the columns of q and k, the last is the norms', and `points` before it are points: their products cancel.

    Returns:
        The means of v [b, h, n, dv] and of z [b, n, h, cz], and the logits' log-sum-exp [b, h, n] in base 2, through
        which no gradient goes.
    """
    with without_autocast(q):
        return _forward(q, k, v, z, bias_weight, there, pair_mask, points)


@ipa_triton.register_fake
def _(q, k, v, z, bias_weight, there, pair_mask, points):  # type: ignore[no-untyped-def]
    return _outputs(q, v, z)


@torch.library.custom_op("foldkernels::ipa_triton_backward", mutates_args=())
def ipa_triton_backward(
    d_out: Tensor, d_pair: Tensor, q: Tensor, k: Tensor, v: Tensor, z: Tensor, bias_weight: Tensor, there: Tensor,
    pair_mask: Tensor | None, points: int, out: Tensor, pair: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v, z and bias_weight."""
    with without_autocast(q):
        return _backward(d_out, d_pair, q, k, v, z, bias_weight, there, pair_mask, points, out, pair, lse)


@ipa_triton_backward.register_fake
def _(d_out, d_pair, q, k, v, z, bias_weight, there, pair_mask, points, out, pair, lse):  # type: ignore[no-untyped-def]
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dz, torch.empty_like(bias_weight)


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(output[2])
    *tensors, ctx.points = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx, d_out, d_pair, _):  # type: ignore[no-untyped-def]
    *inputs, out, pair, lse = ctx.saved_tensors
    given = (d_out.contiguous(), d_pair.contiguous(), *inputs, ctx.points, out, pair, lse)
    return *ipa_triton_backward(*given), None, None, None


ipa_triton.register_autograd(as_remembered(_gradients), setup_context=remembering(_keep))
no_double_backward(ipa_triton_backward, operation="invariant_point_attention", kernel="triton")
