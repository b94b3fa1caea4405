"""The edge transition's Triton kernels, as custom operators: launches, memory, autograd. Imported by `load` only."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from triton.runtime.errors import OutOfResources

from ..common.blocking import row_blocks
from ..common.matmul import accumulate_
from ..dtypes import TensorList
from ..hardware import machine
from ..triton_tools import _language
from ..triton_tools._language import INTERPRETED
from ..triton_tools.tile_cache import TileCache, length_class, source_of
from . import _triton
from ._autograd import differentiate
from ._rows import Split
from ._tiles import Tile, tiles_for, widths
from ._triton import KERNELS

_CHIP_OF_THE_INTERPRETER = (8, 0)
_TILES = TileCache("edge_transition", source_of(_triton, _language), OutOfResources)
Result = TypeVar("Result")


def _inner_contiguous(x: Tensor) -> Tensor:
    """The tensor itself, or a copy where its last axis is spread out: a pair is then read in vectors."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class _Call:
    """What all launches of one call have in common."""

    def __init__(self, z: Tensor, parts: list[Tensor], mask: Tensor | None, eps: float) -> None:
        split = Split(*parts)
        self.z, self.eps = _inner_contiguous(z), eps
        self.b, self.n, _, self.cz = z.shape
        self.hidden, self.c_out = split.weight_2.shape[0], split.weight_out.shape[0]
        self.wide = widths(self.cz, (self.hidden - self.cz) // 2, self.c_out)
        chip = machine.capability("cuda", z.device.index) if z.is_cuda else None
        self.capability = chip or _CHIP_OF_THE_INTERPRETER
        self.masked = mask is not None
        self.mask = z.new_zeros(self.b, 1) if mask is None else mask.float()
        hidden, out = self.wide.hidden, self.wide.out
        # Residues' shares, biases and LayerNorm are added in float32; what is multiplied has z's type.
        self.first_i, self.first_j = (self._wide(x, hidden) for x in (split.first_i, split.first_j))
        self.last_i, self.last_j = (self._wide(x, out) for x in (split.last_i, split.last_j))
        self.bias_2 = self._wide(split.bias_2, hidden)
        self.norm_weight, self.norm_bias = (self._wide(x, out) for x in (split.norm_weight, split.norm_bias))
        self.weight_1 = self._matrix(split.weight_1, hidden, self.wide.z)
        self.weight_2 = self._matrix(split.weight_2, hidden, hidden)
        self.weight_out = self._matrix(split.weight_out, out, hidden)
        self.weight_skip = self._matrix(split.weight_skip, out, self.wide.z)

    def _wide(self, x: Tensor, width: int) -> Tensor:
        return pad(x.float(), (0, width - x.shape[-1])).contiguous()

    def _matrix(self, x: Tensor, rows: int, columns: int) -> Tensor:
        return pad(x.to(self.z.dtype), (0, columns - x.shape[1], 0, rows - x.shape[0])).contiguous()

    def tiled(self, kernel: str, rows: slice, run: Callable[[Tile], Result]) -> Result:
        """Run a kernel over some rows in the tile that the chip runs it best in."""
        words: dict[str, int | str] = {
            "kernel": kernel, "dtype": str(self.z.dtype), "cz": self.cz, "hidden": self.hidden, "cz_out": self.c_out,
            "rows": length_class(rows.stop - rows.start), "n": length_class(self.n),
        }  # fmt: skip
        return _TILES.run(words, tiles_for(self.capability, kernel), run, self.z.device)

    def programs(self, tile: Tile, rows: slice) -> int:
        """How many rectangles cover some rows."""
        return -(-(rows.stop - rows.start) // tile.rows) * -(-self.n // tile.columns)

    def launch(self, kernel: str, tile: Tile, rows: slice, *arguments: Any, **options: Any) -> None:
        """Run a kernel over some rows, in a tile's size. The interpreter's CPU needs no guard."""
        with torch.cuda.device(self.z.device) if self.z.is_cuda else nullcontext():
            KERNELS[kernel][(self.programs(tile, rows),)](
                *arguments,
                CZ=self.cz,
                Z=self.wide.z,
                OUT=self.wide.out,
                PART=self.wide.part,
                PARTS=self.wide.parts,
                I=tile.rows,
                J=tile.columns,
                BLOCK=min(tile.block, self.wide.part),
                PRECISION="ieee",
                INTERPRETED=INTERPRETED,
                num_warps=tile.warps,
                num_stages=tile.stages,
                **options,
            )

    def update(
        self,
        kernel: str,
        tile: Tile,
        item: int,
        rows: slice,
        transposed: tuple[Tensor, Tensor, Tensor, Tensor],
        out: Tensor,
        d_out: Tensor,
        kept: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    ) -> None:
        """Run `tile_kernel` over some rows of an item."""
        first, second, last, skip = transposed
        z = self.z[item]
        self.launch(
            kernel, tile, rows,
            z, self.mask[item], first, self.first_i[item], self.first_j[item], second, self.bias_2, last, skip,
            self.last_i[item], self.last_j[item], self.norm_weight, self.norm_bias, out, d_out, *kept,
            *z.stride()[:2], *out.stride()[:2], *d_out.stride()[:2], rows.start, rows.stop, self.n, self.eps,
            C_OUT=self.c_out, MASKED=self.masked, BACKWARD=kernel == "hidden",
        )  # fmt: skip

    def forward(self, item: int, weights: tuple[Tensor, Tensor, Tensor, Tensor], out: Tensor) -> None:
        """Update an item."""
        rows, nothing = slice(0, self.n), (out,) * 5
        self.tiled("forward", rows, lambda tile: self.update("forward", tile, item, rows, weights, out, out, nothing))

    def hidden_layers(
        self,
        item: int,
        rows: slice,
        weights: tuple[Tensor, Tensor, Tensor, Tensor],
        d_out: Tensor,
        kept: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Fill `kept`: both hidden layers, the last layer's gradient. Returns those of LayerNorm's scale and shift."""

        def run(tile: Tile) -> Tensor:
            sums = self.z.new_empty(2, self.programs(tile, rows), self.wide.out, dtype=torch.float32)
            self.update("hidden", tile, item, rows, weights, d_out, d_out, (*kept, *sums))
            return sums

        scale, shift = self.tiled("hidden", rows, run).sum(1)
        return scale, shift

    def gradients(self, rows: slice, *arguments: Any) -> None:
        """Run `gradients_kernel` over some rows."""
        self.tiled("gradients", rows, lambda tile: self.launch("gradients", tile, rows, *arguments))

    def transposed(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The weights as the forward products take them."""
        first, second, last, skip = (
            weight.t().contiguous() for weight in (self.weight_1, self.weight_2, self.weight_out, self.weight_skip)
        )
        return first, second, last, skip


@torch.library.custom_op("foldkernels::edge_transition_triton", mutates_args=())
def edge_transition_triton(z: Tensor, parts: TensorList, mask: Tensor | None, eps: float) -> Tensor:
    """Update z [b, n, n, cz]; `parts` are the fields of `Split`."""
    call = _Call(z, parts, mask, eps)
    out = z.new_empty(*z.shape[:3], call.c_out)
    weights = call.transposed()
    for item in range(call.b if call.n else 0):
        call.forward(item, weights, out[item])
    return out


@edge_transition_triton.register_fake
def _(z, parts, mask, eps):  # type: ignore[no-untyped-def]
    return z.new_empty(*z.shape[:3], Split(*parts).weight_out.shape[0])


@torch.library.custom_op("foldkernels::edge_transition_triton_backward", mutates_args=())
def edge_transition_triton_backward(
    d_out: Tensor, z: Tensor, parts: TensorList, mask: Tensor | None, eps: float
) -> TensorList:
    """The gradients of z and of each part, in this order; hidden layers are kept for one block of rows at a time."""
    call = _Call(z, parts, mask, eps)
    d_out, n, wide = _inner_contiguous(d_out), call.n, call.wide
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)

    def sums(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=z.device)

    b, hidden, last = call.b, wide.hidden, wide.out
    found = Split(
        sums(b, n, hidden), sums(b, n, hidden), sums(b, n, last), sums(b, n, last),
        sums(hidden, call.cz), sums(hidden, hidden), sums(hidden),
        sums(last, hidden), sums(last, call.cz), sums(last), sums(last),
    )  # fmt: skip
    weights = call.transposed()
    for item, rows in row_blocks(z):
        pairs = (rows.stop - rows.start) * n
        h_first, h_second, d_first, d_second = z.new_empty(4, pairs, wide.hidden).unbind()
        d_last = z.new_empty(pairs, wide.out)
        d_scale, d_shift = call.hidden_layers(item, rows, weights, d_out[item], (h_first, h_second, d_last))
        call.gradients(
            rows,
            d_last, h_first, h_second, call.weight_out, call.weight_2, call.weight_1, call.weight_skip,
            d_first, d_second, dz[item], *dz.stride()[1:3], rows.start, rows.stop, n,
        )  # fmt: skip
        z_pairs = call.z[item, rows].reshape(pairs, call.cz)
        found.norm_weight.add_(d_scale)
        found.norm_bias.add_(d_shift)
        found.bias_2.add_(d_second.sum(0, dtype=torch.float32))
        accumulate_(found.weight_out, d_last.t(), h_second)
        accumulate_(found.weight_skip, d_last.t(), z_pairs)
        accumulate_(found.weight_2, d_second.t(), h_first)
        accumulate_(found.weight_1, d_first.t(), z_pairs)
        for given, of_i, of_j in ((d_first, found.first_i, found.first_j), (d_last, found.last_i, found.last_j)):
            by_pair = given.view(-1, n, given.shape[-1])
            of_i[item, rows] = by_pair.sum(1, dtype=torch.float32)
            of_j[item].add_(by_pair.sum(0, dtype=torch.float32))
    # What was padded for the kernels is left out again.
    gradients = (
        gradient[tuple(slice(size) for size in part.shape)].to(part.dtype)
        for gradient, part in zip(found, parts, strict=True)
    )
    return [dz, *(gradient.contiguous() for gradient in gradients)]


@edge_transition_triton_backward.register_fake
def _(d_out, z, parts, mask, eps):  # type: ignore[no-untyped-def]
    like = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]
    return [torch.empty_like(z, memory_format=torch.contiguous_format), *like]


differentiate(edge_transition_triton, edge_transition_triton_backward, kernel="triton")
