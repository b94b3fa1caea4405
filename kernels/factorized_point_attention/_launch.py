"""Factorised point attention in Triton, as custom operators: launches, memory, autograd. Imported by `load` only."""

from contextlib import nullcontext
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ..common.double_backward import no_double_backward
from ..hardware import machine
from ..hardware.tf32 import as_remembered, remembering
from ..triton_tools import _language
from ..triton_tools._language import INTERPRETED
from ..triton_tools.tile_cache import TileCache, length_class, source_of
from . import _triton
from ._tiles import Tile, chunks, tiles_for, width
from ._triton import KERNELS

_CHIP_OF_THE_INTERPRETER = (8, 0)
_TILES = TileCache("factorized_point_attention", source_of(_triton, _language), OutOfResources)


def _whole(x: Tensor) -> Tensor:
    """The tensor itself, or a copy where its last axis is spread out."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Every stride but the last, which is one."""
    return [stride for x in tensors for stride in x.stride()[:-1]]


class _Call:
    """What all launches of one call have in common."""

    def __init__(self, q: Tensor, v: Tensor, qf: Tensor, vf: Tensor) -> None:
        self.b, self.n, self.h, self.c = q.shape
        self.f, self.dv, self.pv = qf.shape[-1], v.shape[-1], vf.shape[-1]
        self.device, self.dtype = q.device, q.dtype
        self.capability = machine.capability("cuda", q.device.index) if q.is_cuda else _CHIP_OF_THE_INTERPRETER
        self.scale = sqrt(1 / (3 * self.c))

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return 0 in (self.b, self.n, self.h)

    def launch(self, kernel: str, *arguments: Any) -> None:
        """Run a kernel in the tile that the chip runs it best in."""
        words: dict[str, int | str] = {
            "kernel": kernel, "dtype": str(self.dtype), "c": self.c, "f": self.f, "dv": self.dv, "pv": self.pv,
            "programs": length_class(self.b * self.h), "n": length_class(self.n),
        }  # fmt: skip
        tiles = tiles_for(self.capability, kernel, self.dtype, self.f)
        _TILES.run(words, tiles, lambda tile: self.launch_as(tile, kernel, *arguments), self.device)

    def launch_as(self, tile: Tile, kernel: str, *arguments: Any) -> None:
        """Run it on its first columns, points with them, and then on the other columns."""
        constants = self.constants(tile)
        rows = tile.queries if kernel in ("forward", "queries") else tile.keys
        columns = constants["VCHUNKS" if kernel in ("forward", "values") else "CHUNKS"]
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            for first, last, points in ((0, 1, True), (1, columns, False)):
                if last > first:
                    KERNELS[kernel][(-(-self.n // rows), last - first, self.b * self.h)](
                        *arguments,
                        self.h,
                        self.n,
                        first,
                        self.scale,
                        **constants,
                        POINTS=points,
                        INTERPRETED=INTERPRETED,
                        num_warps=tile.warps,
                        num_stages=tile.stages,
                    )

    def constants(self, tile: Tile) -> dict[str, Any]:
        """Sizes, and the types of products: float32 as three of tf32 beside 16-bit data, else as it is."""
        (of_c, c_chunks), (of_v, v_chunks) = chunks(self.c, tile), chunks(self.dv, tile)
        sizes = {"C": self.c, "CW": of_c, "CHUNKS": c_chunks, "F": self.f, "FW": width(self.f)}
        sizes |= {"DV": self.dv, "VW": of_v, "VCHUNKS": v_chunks, "PV": self.pv, "PW": width(self.pv)}
        wide = "ieee" if self.dtype is torch.float32 else "tf32x3"
        tiles = {"I": tile.queries, "J": tile.keys}
        return {**sizes, **tiles, "PRECISION": "ieee", "WIDE_PRECISION": wide}


def _outputs(v: Tensor, vf: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # In float32: the backward multiplies them with what is asked of them, and subtracts the like.
    b, n, h, _ = v.shape
    return vf.new_empty(v.shape), vf.new_empty(vf.shape), vf.new_empty(b, h, n)


@torch.library.custom_op("foldkernels::factorized_point_attention_triton", mutates_args=())
def factorized_point_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qf: Tensor,
    kf: Tensor,
    kb: Tensor,
    vf: Tensor,
    ends: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attended v [b, n, h, dv], attended vf [b, n, h, pv], and the lse [b, h, n] in base 2; all in float32.

    q and k are [b, n, h, c], qf and kf [b, n, h, f], kb [b, h, n] and ends int32 [b]; see `_triton`.
    """
    out, out_f, lse = _outputs(v, vf)
    call = _Call(q, v, qf, vf)
    if not call.empty:
        inputs = tuple(_whole(x) for x in (q, k, v, qf, kf))
        kb, vf = kb.contiguous(), _whole(vf)
        call.launch("forward", *inputs, kb, vf, ends, out, out_f, lse, *_strides(*inputs, vf, out, out_f))
    return out, out_f, lse


@factorized_point_attention_triton.register_fake
def _(q, k, v, qf, kf, kb, vf, ends):  # type: ignore[no-untyped-def]
    return _outputs(v, vf)


def _gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


@torch.library.custom_op("foldkernels::factorized_point_attention_triton_backward", mutates_args=())
def factorized_point_attention_triton_backward(
    d_out: Tensor,
    d_out_f: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qf: Tensor,
    kf: Tensor,
    kb: Tensor,
    vf: Tensor,
    ends: Tensor,
    out: Tensor,
    out_f: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the first seven inputs."""
    d_q, d_k, d_v, d_qf, d_kf, d_kb, d_vf = _gradients(q, k, v, qf, kf, kb, vf)
    call = _Call(q, v, qf, vf)
    if not call.empty:
        asked = (_whole(d_out.to(v.dtype)), _whole(d_out_f))
        delta = (out * asked[0].to(out.dtype)).sum(-1) + (out_f * d_out_f).sum(-1)
        delta = delta.transpose(1, 2).contiguous()
        q, k, v, qf, kf, vf = (_whole(x) for x in (q, k, v, qf, kf, vf))
        kb = kb.contiguous()
        given = (*asked, q, k, v, qf, kf, kb, vf, ends, lse, delta)
        strides = _strides(*asked, q, k, v, qf, kf, vf)
        call.launch("queries", *given, d_q, d_qf, *strides, *_strides(d_q, d_qf))
        call.launch("keys", *given, d_k, d_kf, d_kb, *strides, *_strides(d_k, d_kf))
        of_weights = (*asked, q, k, qf, kf, kb, ends, lse, d_v, d_vf)
        call.launch("values", *of_weights, *_strides(*asked, q, k, qf, kf, d_v, d_vf))
    return d_q, d_k, d_v, d_qf, d_kf, d_kb, d_vf


@factorized_point_attention_triton_backward.register_fake
def _(d_out, d_out_f, q, k, v, qf, kf, kb, vf, ends, out, out_f, lse):  # type: ignore[no-untyped-def]
    return _gradients(q, k, v, qf, kf, kb, vf)


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, d_out, d_out_f, _):  # type: ignore[no-untyped-def]
    return *factorized_point_attention_triton_backward(d_out, d_out_f, *ctx.saved_tensors), None


factorized_point_attention_triton.register_autograd(as_remembered(_backward), setup_context=remembering(_keep))
no_double_backward(factorized_point_attention_triton_backward, operation="factorized_point_attention", kernel="triton")
