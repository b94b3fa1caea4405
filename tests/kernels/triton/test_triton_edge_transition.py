"""The Triton edge transition: its numbers in Triton's interpreter, its code for four chips, its limits.

No GPU is needed, and none is used: what a chip makes of that code, and how fast, is for the GPU suite.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from foldkernels.kernels import registry
from foldkernels.kernels.edge_transition import _tiles as tiles
from foldkernels.kernels.triton_tools import gpu_limits

from ...support.edge_code import code, widest
from ...support.triton_tools import CHIPS, Ask, interpreter, right, slow, usage, with_triton, wrong

# Numbers --------------------------------------------------------------------------------------------------------------

#: By hand, so that a short chain has several tiles a row, and a narrow layer several parts and blocks of columns.
SMALL_TILE = [4, 4, 16, 4, 2]
PLAIN: dict[str, Any] = {
    "what": "measure",
    "b": 2, "n": 5, "cn": 9, "cz": 13, "cz_out": 15,
    "dtype": "float32", "masked": True, "layout": "plain", "fault": "", "twice": False,
    "tile": SMALL_TILE, "part": 16, "pairs": 2048,
}  # fmt: skip


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Ask the interpreter about a case: `PLAIN`, but for what is named."""
    with interpreter("edge_interpreter", PLAIN) as answer:
        yield answer


@with_triton
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("n", [1, 2, 7, *slow(15, 16, 17, 33)])
def test_lengths(ask, n, masked):
    """With the tile of the chip, and several blocks of rows on the way back."""
    right(ask(n=n, masked=masked, tile=None, part=64, pairs=3 * n))


@with_triton
@pytest.mark.parametrize("pairs", [1, 15, 2048], ids=["a row a block", "three rows a block", "one block"])
def test_several_tiles_parts_and_blocks(ask, pairs):
    right(ask(pairs=pairs))


@pytest.mark.quick
@with_triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("cz", "cn", "cz_out"), [(16, 5, 13), (8, 1, 32), pytest.param(128, 128, 128, marks=pytest.mark.slow)]
)
def test_widths_and_types(ask, cz, cn, cz_out, dtype):
    wide = cz == 128
    found = ask(
        cz=cz, cn=cn, cz_out=cz_out, dtype=dtype, part=64 if wide else 16, tile=None if wide else SMALL_TILE, b=1
    )
    right(found)
    assert {x["dtype"] for name, x in found.items() if name != "of_empty_rows"} == {f"torch.{dtype}"}


@with_triton
@pytest.mark.parametrize("layout", ["transposed", "spread", "expanded"])
def test_layouts(ask, layout):
    """Of the pair representation, and of the gradient that arrives."""
    right(ask(layout=layout))


@with_triton
def test_every_run_gives_the_same(ask):
    found = ask(b=1, twice=True)
    right(found)
    assert all(x["same"] for x in found.values() if isinstance(x, dict))


@with_triton
@pytest.mark.parametrize("fault", ["flipped mask", "residues exchanged", "lost skip", "other norm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_comparison_sees_a_mistake(ask, dtype, fault):
    seen = " ".join(wrong(ask(b=1, dtype=dtype, fault=fault)))
    assert all(f"{name}:" in seen for name in ("out", "d_z", "d_nodes", "d_weight_1", "d_weight_2")), seen


@with_triton
@pytest.mark.parametrize("masked", [False, True])
def test_the_operator_is_one(ask, masked):
    """PyTorch's own checks, and no second derivative."""
    found = ask(what="operators", n=2, masked=masked, tile=None, part=64)
    assert set(found["opcheck"].values()) == {"SUCCESS"}, found["opcheck"]
    assert "edge_transition: the kernel 'triton' has no second derivative" in found["twice"]


@with_triton
@pytest.mark.parametrize("n", [5, 9])
def test_each_number_of_z_is_read_once(ask, n):
    found = ask(what="loads", n=n)
    assert found["loaded"] == found["numbers"] > 0


# Code for each chip ---------------------------------------------------------------------------------------------------


@with_triton
@pytest.mark.slow
@pytest.mark.parametrize("kernel", tiles.KERNELS)
@pytest.mark.parametrize("arch", CHIPS)
def test_the_widest_fit(arch, kernel, tmp_path):
    """The widest layers that `supports` lets through."""
    found = code(arch, kernel, "bf16", tiles.tiles_for(CHIPS[arch], kernel)[0], sizes=widest(arch))
    assert usage(found, tmp_path).shared <= gpu_limits.shared_memory(CHIPS[arch])


@with_triton
@pytest.mark.slow
@pytest.mark.parametrize(("precision", "pairs", "spills"), [("tf32x3", 16, True), ("tf32", 32, False)])
def test_why_not_float32(precision, pairs, spills, tmp_path):
    """What `supports` says of it: in three products of tf32 a tile of 16 pairs spills; in one, 32 fit."""
    tile = tiles.Tile(4, pairs // 4, 32, 4, 2)
    stack = usage(code(80, "forward", "fp32", tile, precision=precision), tmp_path).stack
    assert stack > 1000 if spills else stack == 0


# Whom it serves -------------------------------------------------------------------------------------------------------


def _why(**more: Any) -> str:
    sizes = {name: more.pop(name, 128) for name in ("cn", "cz", "cz_out")}
    fields = {"device": "cuda", "capability": (9, 0), "dtype": torch.bfloat16, **more}
    request = registry.Request(operation="edge_transition", dims=registry.Dims({"n": 0, **sizes}), **fields)
    return "; ".join(map(str, registry.kernels("edge_transition")["triton"].supports(request)))


def test_what_it_refuses():
    assert not _why()
    assert not _why(capability=(8, 0), dtype=torch.float16, cz=24, cz_out=96, cn=7, grad=True, deterministic=True)
    assert "registers" in _why(dtype=torch.float32) and not _why(dtype=torch.float32, precision="bfloat16")
    assert "32 pairs" in _why(dtype=torch.float32, precision="tf32")
    assert "AMD's" in _why(capability=None)
    assert "7.5" in _why(capability=(7, 5))
    assert "not in float64" in _why(dtype=torch.float64)
    assert "width 129 do not fit" in _why(cz=129)
    assert "width 256 do not fit" in _why(cz_out=256)
    for chip, most in (((8, 0), 448), ((8, 9), 384), ((9, 0), 512), ((10, 0), 384)):
        widest = (most - 128) // 2
        assert not _why(cn=widest, capability=chip)
        assert f"hidden layers of width {most + 2}" in _why(cn=widest + 1, capability=chip)
    assert "not on mps" in _why(device="mps", capability=None)
    assert "not on cpu" in _why(device="cpu", capability=None)


@pytest.mark.parametrize(("preset", "kernel"), [("triton", "triton"), ("flash", "triton"), ("auto", "torch")])
def test_presets_on_an_h100(preset, kernel):
    """`auto` waits for a run on a GPU."""
    from foldkernels.kernels.hardware.machine import MACHINES

    dims = registry.Dims({"n": 256, "cn": 128, "cz": 128, "cz_out": 128})
    there = MACHINES["h100"]
    request = registry.Request("edge_transition", "cuda", torch.bfloat16, dims, capability=there.capability, grad=True)
    assert registry.decide(request, {"preset": preset}, there).kernel.name == kernel


def test_every_chip_has_its_tiles():
    found = {tiles.chips(chip) for chip in ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1))}
    assert found == set(tiles.TILES) == set(tiles.MOST_PARTS)
    assert tiles.chips((8, 7)) == tiles.MIDDLE and tiles.chips((12, 0)) == tiles.SMALL
    assert all(len(found) == len(tiles.KERNELS) for found in tiles.TILES.values())
