"""Every tile of every chip's table, in numbers: Triton's interpreter takes itself for one chip, and is told otherwise.

How many warps run a tile, and how many loads are under way, are a GPU's affair: tiles that differ in these alone are
one here.
"""

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

import pytest
import torch

from foldkernels.kernels.biased_attention import _tiles as biased
from foldkernels.kernels.edge_transition import _tiles as edges
from foldkernels.kernels.factorized_point_attention import _tiles as factorized
from foldkernels.kernels.invariant_point_attention import _tiles as points

from ...support.triton_tools import Ask, interpreter, with_triton

#: One of every family that a table knows; None is AMD's.
NVIDIA = ((9, 0), (10, 0), (8, 9), (8, 0), (8, 6), (12, 0))
CHIPS: dict[str, tuple[tuple[int, int] | None, ...]] = {
    "invariant_point_attention": NVIDIA,
    "edge_transition": NVIDIA,
    "factorized_point_attention": NVIDIA,
    "triangle_attention": (*NVIDIA, None),
    "attention_pair_bias": (*NVIDIA, None),
}

PLAIN: dict[str, Any] = {"batch": 1, "fault": ""}


class Cell(NamedTuple):
    """Sizes at which an operation takes tiles from one place of its tables.

    Attributes:
        operation: Its name.
        dtype: The type of the inputs.
        sizes: Without the length.
        n: More than the largest tile, and no multiple of anything.
        quick: Whether every run of the tests tries it.
        batch: Items; the second of them has no residue.
    """

    operation: str
    dtype: str
    sizes: dict[str, int]
    n: int
    quick: bool = True
    batch: int = 1

    def tiles(self) -> dict[str, list[Any]]:
        """Triton kernel -> the tiles that any chip would try, those that differ in numbers, the first choices first."""
        found: dict[str, dict[tuple[Any, ...], Any]] = {}
        tables = [self.of_chip(chip) for chip in CHIPS[self.operation]]
        for which in (slice(1), slice(1, None)):
            for table in tables:
                for kernel, tiles in table.items():
                    for tile in tiles[which]:
                        found.setdefault(kernel, {}).setdefault(tuple(tile._replace(warps=0, stages=0)), tile)
        return {kernel: list(tiles.values()) for kernel, tiles in found.items()}

    def of_chip(self, chip: tuple[int, int] | None) -> dict[str, list[Any]]:
        """Triton kernel -> the tiles that a chip would try."""
        dtype, sizes = getattr(torch, self.dtype), self.sizes
        if self.operation == "invariant_point_attention":
            widths = {"d": sizes["c"] + 3 * sizes["p"] + 1, "dv": sizes["c"] + 3 * sizes["pv"]}
            widths |= {"h": sizes["h"], "cz": sizes["cz"], "points": 3 * sizes["p"]}
            rows = sizes["cz"] % 8 == 0  # of 16 bytes, as descriptors want them
            plans = {kernel: points.plans_for(chip, kernel, dtype, **widths) for kernel in ("forward", "backward")}
            return {kernel: [x for x in some if rows or not x.descriptors] for kernel, some in plans.items()}
        if self.operation == "edge_transition":
            return {kernel: edges.tiles_for(chip, kernel) for kernel in edges.KERNELS} if chip else {}
        if self.operation == "factorized_point_attention":
            return {kernel: factorized.tiles_for(chip, kernel, dtype) for kernel in factorized.KERNELS}
        if biased.width(sizes["d"]) > max(biased.TILES[biased.chips(chip)][biased._TYPES[dtype]]):
            return {}
        some = biased.KERNELS if self.operation == "triangle_attention" else biased.KERNELS[:3]
        return {kernel: biased.tiles_for(chip, kernel, dtype, sizes["d"]) for kernel in some}

    def rounds(self) -> list[dict[str, Any]]:
        """Tiles for all kernels at once, until each kernel has had all of its own."""
        by_kernel = self.tiles()
        return [
            {kernel: tile or by_kernel[kernel][-1] for kernel, tile in zip(by_kernel, some, strict=True)}
            for some in zip_longest(*by_kernel.values())
        ]


def _points(h: int, cz: int, **more: Any) -> Cell:
    return Cell("invariant_point_attention", sizes={"h": h, "c": 4, "p": 2, "pv": 3, "cz": cz}, **more)


def _edges(**more: Any) -> Cell:
    return Cell("edge_transition", sizes={"cn": 29, "cz": 13, "cz_out": 15}, **more)


def _factorized(c: int, **more: Any) -> Cell:
    return Cell("factorized_point_attention", sizes={"h": 1, "c": c, "p": 2, "pv": 3, "r": 2, "cp": 3}, **more)


def _triangle(d: int, n: int, dtype: str) -> Cell:
    """Not of 35 in float32, where an entry of dk for heads of 101 has 1.002 of the error that it may have.

    Weights come from a rounded log-sum-exp, which costs this entry 8.3e-6 of 4.8 (4.5e-6 at 33 and 37); what may be is
    twice plain PyTorch's error, which happens to be half of its usual there.
    """
    return Cell("triangle_attention", dtype, {"h": 1, "d": d}, n, quick=False)


CELLS = [
    *(_points(h, cz, dtype=dtype, n=17, batch=2, quick=h == 3)
      for dtype in ("bfloat16", "float32") for h, cz in ((3, 13), (9, 13), (2, 130))),
    _points(3, 24, dtype="bfloat16", n=17, batch=2, quick=False),
    *(_edges(dtype=dtype, n=17, quick=dtype == "bfloat16") for dtype in ("bfloat16", "float32")),
    *(_factorized(140, dtype=dtype, n=67, quick=dtype == "bfloat16") for dtype in ("bfloat16", "float32")),
    *(_triangle(d, n, dtype) for dtype, n in (("bfloat16", 131), ("float32", 37)) for d in (9, 29, 50, 101)),
    *(Cell("attention_pair_bias", dtype, {"h": 2, "d": 24, "cz": 13}, 131, quick=dtype == "bfloat16")
      for dtype in ("bfloat16", "float32")),
]  # fmt: skip


def _parameters() -> Iterator[Any]:
    """The first round of a quick cell, Hopper's first choices, is tried by every run of the tests."""
    for cell in CELLS:
        sizes = " ".join(f"{name}={size}" for name, size in cell.sizes.items())
        for i in range(len(cell.rounds())):
            marks = () if cell.quick and i == 0 else (pytest.mark.slow,)
            yield pytest.param(cell, i, id=f"{cell.operation} {cell.dtype} {sizes} {i}", marks=marks)


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    with interpreter("tiles_interpreter", PLAIN) as answer:
        yield answer


@with_triton
@pytest.mark.parametrize(("cell", "i"), [*_parameters()])
def test_every_tile_is_right(ask, cell, i):
    """Outputs and every gradient, with masks; each kernel in the tile that was named."""
    tiles = cell.rounds()[i]
    asked = {name: getattr(cell, name) for name in ("operation", "dtype", "sizes", "n", "batch")}
    found = ask(**asked, tiles=tiles)
    assert not found["wrong"] and found["judged"] > 1, found["wrong"]
    assert found["ran"] == {kernel: list(tile) for kernel, tile in tiles.items()}


@with_triton
def test_a_tile_that_is_left_out_is_seen(ask):
    """Outputs, and gradients of queries, of one tile of queries."""
    (cell,) = (cell for cell in CELLS if (cell.operation, cell.dtype) == ("attention_pair_bias", "float32"))
    found = ask(
        operation=cell.operation, dtype=cell.dtype, sizes=cell.sizes, n=37, tiles=cell.rounds()[0], fault="short"
    )
    assert {"output 0", "gradient of q"} <= {words.partition(":")[0] for words in found["wrong"]}


def test_every_operation_with_tiles_is_here():
    """And every one of them has several rounds: what the interpreter's own chip takes is not all."""
    from foldkernels.kernels import registry

    ours = {name for name in registry.operations() if "triton" in registry.kernels(name)}
    assert {cell.operation for cell in CELLS} == ours
    assert all(len(cell.rounds()) > 1 for cell in CELLS)
