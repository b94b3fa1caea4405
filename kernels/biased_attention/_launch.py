"""Attention with a dense bias in Triton, as custom operators: launches, memory, autograd. Imported by `load` only."""

from collections.abc import Callable
from contextlib import nullcontext
from math import gcd
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ..common.double_backward import no_double_backward
from ..hardware import machine
from ..hardware.tf32 import allowed, as_remembered, remembering
from ..triton_tools import _language
from ..triton_tools._language import INTERPRETED
from ..triton_tools.tile_cache import TileCache, length_class, source_of
from . import _triton_backward, _triton_forward
from ._tiles import Tile, tiles_for, width
from ._triton_forward import KERNELS

_ALIGNED = 16  # elements; Triton reads in vectors where a size is a multiple of this
_PROGRAMS = 512  # enough for the largest chip; more only where the rows must be split for it
_CHIP_OF_THE_INTERPRETER = (8, 0)
_SOURCE = source_of(_triton_forward, _triton_backward, _language)
Result = TypeVar("Result")


def _inner_contiguous(x: Tensor) -> Tensor:
    """The tensor itself, or a copy where its last axis is spread out: a head is then read in vectors."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _padded_bias(bias: Float[Tensor, "b h i j"]) -> Float[Tensor, "b h i p"]:
    """The bias with its keys side by side, up to a multiple of 16.

    Every row reads the bias again, so that a copy which makes those reads whole costs little. It is one where the
    number of keys is no such multiple, or the bias came with its heads innermost.
    """
    keys = bias.shape[-1]
    padded = -(-keys // _ALIGNED) * _ALIGNED
    if padded == keys and bias.stride(-1) == 1 and bias.stride(-2) % _ALIGNED == 0:
        return bias
    out = bias.new_zeros(*bias.shape[:-1], padded)
    out[..., :keys] = bias
    return out


def _reach(mask: Bool[Tensor, "b r j"] | None, padded_keys: int, like: Tensor) -> Float[Tensor, "b r p"]:
    """0 where a key takes part, -inf elsewhere and beyond; one number that nobody reads without a mask."""
    if mask is None:
        return like.new_zeros(1, dtype=torch.float32)
    reach = like.new_full((*mask.shape[:-1], padded_keys), -torch.inf, dtype=torch.float32)
    reach[..., : mask.shape[-1]].masked_fill_(mask, 0.0)
    return reach


class _Call:
    """What all launches of one call have in common."""

    def __init__(self, tiles: TileCache, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> None:
        self.tiles = tiles
        self.q, self.k, self.v = (_inner_contiguous(x) for x in (q, k, v))
        self.bias = _padded_bias(bias)
        self.padded_keys = self.bias.shape[-1]
        self.masked = mask is not None
        self.reach = _reach(mask, self.padded_keys, q)
        self.b, self.h, self.r, self.i, self.d = q.shape
        self.j = k.shape[-2]
        self.capability = machine.capability("cuda", q.device.index) if q.is_cuda else _CHIP_OF_THE_INTERPRETER
        # PyTorch's own switch for float32 products; without it, they are exact. AMD's chips have no tf32 for all.
        rounded = allowed() and self.capability is not None
        self.precision = "tf32" if q.dtype is torch.float32 and rounded else "ieee"

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return 0 in (self.b, self.h, self.r, self.i, self.j, self.d)

    def tiled(self, kernel: str, run: Callable[[Tile], Result]) -> Result:
        """Run a kernel in the tile that the chip runs it best in."""
        words: dict[str, int | str] = {
            "kernel": kernel, "dtype": str(self.q.dtype), "precision": self.precision, "d": self.d,
            "programs": length_class(self.b * self.h * self.r), "rows": "one" if self.r == 1 else "many",
            "i": length_class(self.i), "j": length_class(self.j),
        }  # fmt: skip
        return self.tiles.run(words, tiles_for(self.capability, kernel, self.q.dtype, self.d), run, self.q.device)

    def launch(self, kernel: str, tile: Tile, programs: int, *arguments: Any, **options: Any) -> None:
        """Run a kernel in a tile's size. A device without a number (the interpreter's CPU) needs no guard."""
        with torch.cuda.device(self.q.device) if self.q.is_cuda else nullcontext():
            KERNELS[kernel][(programs,)](
                *arguments,
                D=self.d,
                WIDTH=width(self.d),
                I=tile.queries,
                J=tile.keys,
                MASKED=self.masked,
                PRECISION=self.precision,
                INTERPRETED=INTERPRETED,
                num_warps=tile.warps,
                num_stages=tile.stages,
                **options,
            )

    def over_queries(self, tile: Tile) -> int:
        """How many programs hold all queries."""
        return self.b * self.h * self.r * _blocks(self.i, tile.queries)

    def over_keys(self, tile: Tile) -> int:
        """How many programs hold all keys."""
        return self.b * self.h * self.r * _blocks(self.j, tile.keys)


class _Strides:
    """Every stride but the last, which is one, in units of `unit` elements: a power of two up to 16."""

    def __init__(self, *tensors: Tensor) -> None:
        strides = [stride for x in tensors for stride in x.stride()[:-1]]
        self.unit = gcd(_ALIGNED, *strides)
        self.counts = [stride // self.unit for stride in strides]


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _forward(
    tiles: TileCache, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    out, lse = _out_and_lse(q)
    call = _Call(tiles, q, k, v, bias, mask)
    if call.empty:
        return out.zero_(), lse.fill_(torch.inf)
    strides = _Strides(call.q, call.k, call.v, call.bias, out)
    given = (
        call.q, call.k, call.v, call.bias, call.reach, out, lse, *strides.counts,
        call.h, call.r, call.i, call.j, call.padded_keys, call.d**-0.5,
    )  # fmt: skip
    call.tiled("forward", lambda tile: call.launch("forward", tile, call.over_queries(tile), *given, UNIT=strides.unit))
    return out, lse


def _out_and_lse(q: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the results; out has strides like those of q, so that the caller's permutation back is a view."""
    out = torch.empty_like(q)
    if out.stride(-1) != 1:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:-1], dtype=torch.float32)


def _like(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(
    tiles: TileCache, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None,
    out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_q, d_k, d_v = _like(q), _like(k), _like(v)
    d_bias = torch.empty_like(bias, memory_format=torch.contiguous_format)
    call = _Call(tiles, q, k, v, bias, mask)
    if call.empty:
        return d_q.zero_(), d_k.zero_(), d_v.zero_(), d_bias.zero_()
    d_out = _inner_contiguous(d_out)
    delta = torch.empty_like(lse)
    sizes = (call.h, call.r, call.i, call.j, call.padded_keys)
    scale = call.d**-0.5
    given = (d_out, call.q, call.k, call.v, call.bias)
    # Padded as the bias is: stores of whole vectors take fewer registers.
    whole = call.padded_keys == call.j
    padded = d_bias if whole else d_bias.new_empty(call.b, call.h, call.i, call.padded_keys)
    alone = call.r == 1
    at_queries, at_keys = _Strides(*given, out, d_q), _Strides(*given, d_k, d_v)
    of_queries = (*given, call.reach, out, lse, delta, d_q, padded, *at_queries.counts, *sizes, scale)
    of_keys = (*given, call.reach, lse, delta, d_k, d_v, *at_keys.counts, *sizes, scale)
    options = {"UNIT": at_queries.unit, "WITH_BIAS": alone}
    call.tiled("queries", lambda tile: call.launch("queries", tile, call.over_queries(tile), *of_queries, **options))
    call.tiled("keys", lambda tile: call.launch("keys", tile, call.over_keys(tile), *of_keys, UNIT=at_keys.unit))

    def over_rows(tile: Tile) -> Tensor:
        # By the sizes alone: the order of adding does not depend on how many processors a chip has.
        programs = call.b * call.h * _blocks(call.i, tile.queries) * _blocks(call.j, tile.keys)
        some_rows = _blocks(call.r, min(call.r, _blocks(_PROGRAMS, programs)))
        parts = _blocks(call.r, some_rows)
        sums = padded[None] if parts == 1 else padded.new_empty((parts, *padded.shape), dtype=torch.float32)
        strides = _Strides(*given)
        rest = (call.reach, lse, delta, sums, *strides.counts, call.b, *sizes, some_rows, scale)
        call.launch("bias", tile, parts * programs, *given, *rest, UNIT=strides.unit)
        return sums

    sums = padded[None] if alone else call.tiled("bias", over_rows)
    if len(sums) > 1 or not whole:
        d_bias.copy_((sums[0] if len(sums) == 1 else sums.sum(0))[..., : call.j])
    return d_q, d_k, d_v, d_bias


def fused(operation: str) -> Any:
    """Make the custom operator of an operation; each has its own, so that its errors name it.

    Returns:
        A function of q [b, h, r, i, d], k and v [b, h, r, j, d], bias [b, h, i, j] and mask [b, r, j] (or None) that
        gives [b, h, r, i, d] and the log-sum-exp [b, h, r, i] of the logits in base 2, through which no gradient goes.
    """
    tiles = TileCache(operation, _SOURCE, OutOfResources)

    @torch.library.custom_op(f"foldkernels::{operation}_triton", mutates_args=())
    def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return _forward(tiles, q, k, v, bias, mask)

    @forward.register_fake
    def _(q, k, v, bias, mask):  # type: ignore[no-untyped-def]
        return _out_and_lse(q)

    @torch.library.custom_op(f"foldkernels::{operation}_triton_backward", mutates_args=())
    def backward(
        d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _backward(tiles, d_out, q, k, v, bias, mask, out, lse)

    @backward.register_fake
    def _(d_out, q, k, v, bias, mask, out, lse):  # type: ignore[no-untyped-def]
        return _like(q), _like(k), _like(v), torch.empty_like(bias, memory_format=torch.contiguous_format)

    def keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(*inputs, out, lse)

    def gradients(ctx, d_out, _):  # type: ignore[no-untyped-def]
        return *backward(d_out, *ctx.saved_tensors), None

    forward.register_autograd(as_remembered(gradients), setup_context=remembering(keep))
    no_double_backward(backward, operation=operation, kernel="triton")
    return forward
