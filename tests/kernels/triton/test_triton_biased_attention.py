"""The Triton attention with a dense bias: its numbers in Triton's interpreter, its code for four chips, its limits.

No GPU is needed, and none is used: what a chip makes of that code, and how fast, is for the contract test on a GPU.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from foldkernels.kernels import registry
from foldkernels.kernels.biased_attention import _tiles as tiles
from foldkernels.kernels.triton_tools import gpu_limits

from ...support.biased_code import TYPES, Way, code
from ...support.triton_tools import PTXAS, Ask, interpreter, right, slow, with_triton, wrong

# Numbers --------------------------------------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {
    "operation": "triangle_attention",
    "b": 1, "h": 2, "r": 3, "n": 17, "d": 16,
    "dtype": "float32", "masked": True, "layout": "plain", "wide_bias": False, "given": True,
    "fault": "", "programs": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Ask the interpreter about a case: `PLAIN`, but for what is named."""
    with interpreter("triton_interpreter", PLAIN) as answer:
        yield lambda **case: answer(**{"m": case.get("n", PLAIN["n"]), **case})


@with_triton
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("n", [1, 2, 7, 16, 17, 33, *slow(15, 31, 65, 100)])
def test_lengths(ask, n, masked):
    right(ask(n=n, masked=masked, r=2 if n > 17 else 3, h=1 if n > 17 else 2))


@pytest.mark.quick
@with_triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("d", [8, 24, 32, *slow(1, 5, 16, 48, 64, 80, 128)])
def test_head_sizes(ask, d, dtype):
    """Sizes that are no power of two among them; the bias wider than the data, as a projection gives it."""
    found = ask(d=d, dtype=dtype, wide_bias=dtype != "float32" and d % 16 == 8)
    right(found)
    assert {x["dtype"] for name, x in found.items() if name != "of_empty_rows"} == {f"torch.{dtype}"}


@pytest.mark.quick
@with_triton
@pytest.mark.parametrize("layout", ["transposed", "spread", "expanded"])
def test_layouts(ask, layout):
    right(ask(layout=layout, b=2, h=1, n=7))


@with_triton
@pytest.mark.parametrize(("d", "unit"), [(32, 16), (24, 8), (20, 4), (7, 1)])
def test_strides_come_in_the_largest_units(d, unit):
    """So that heads of 24, as AlphaFold 3's, are loaded in vectors too: Triton looks for multiples of 16 alone."""
    from foldkernels.kernels.biased_attention._launch import _Strides

    q = torch.empty(2, 33, 16 * d).unflatten(-1, (16, d)).transpose(1, 2)[:, :, None]
    bias = torch.empty(2, 16, 33, 48)
    found = _Strides(q, bias)
    assert found.unit == unit
    assert [count * unit for count in found.counts] == [*q.stride()[:-1], *bias.stride()[:-1]]


@with_triton
def test_rows_and_columns_differ_in_number(ask):
    right(ask(b=2, h=1, r=5, n=7, m=18))
    right(ask(operation="attention_pair_bias", r=1, n=18, m=7))


@with_triton
@pytest.mark.parametrize("given", [True, False], ids=["bias", "projected"])
@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_attention_pair_bias(ask, dtype, shared, given):
    """One sequence a bias takes the shorter way to the bias's gradient."""
    right(ask(operation="attention_pair_bias", b=2, r=shared, given=given, dtype=dtype, d=24, masked=given))


@with_triton
@pytest.mark.parametrize("programs", [1, 4, 512], ids=["one part", "three rows a part", "one row a part"])
def test_every_run_gives_the_same(ask, programs):
    """The bias's gradient is summed over rows, and over parts of them where there are few programs."""
    found = ask(r=8, n=5, h=1, d=8, twice=True, programs=programs)
    right(found)
    assert all(x["same"] for x in found.values() if isinstance(x, dict))


@with_triton
@pytest.mark.parametrize("fault", ["flipped mask", "transposed bias", "lost scale", "lost bias"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_comparison_sees_a_mistake(ask, dtype, fault):
    seen = " ".join(wrong(ask(n=7, h=1, dtype=dtype, fault=fault)))
    assert all(name in seen for name in ("out", "d_q", "d_k", "d_v", "d_bias")), seen


@with_triton
@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_the_operator_is_one(ask, layout):
    """PyTorch's own checks; no second derivative, and no gradient that is lost on the way through the lse."""
    found = ask(operators=True, n=5, m=5, h=1, r=2, d=8, layout=layout)
    assert set(found["opcheck"].values()) == {"SUCCESS"}, found["opcheck"]
    assert "triangle_attention: the kernel 'triton' has no second derivative" in found["twice"]
    assert found["lse_differentiable"] is False


# Code for AMD ---------------------------------------------------------------------------------------------------------


@with_triton
@pytest.mark.slow
@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_amd_gets_matrix_instructions(kernel):
    from triton.backends.compiler import GPUTarget

    if "amd" not in os.listdir(PTXAS.parents[2]):
        pytest.skip("this triton has no code for AMD")
    for dtype, d in (("bf16", 32), ("bf16", 64), ("fp32", 32)):
        for tile in tiles.tiles_for(None, kernel, TYPES[dtype], d):
            found = code(GPUTarget("hip", "gfx942", 64), Way(kernel, dtype, "ieee", d), tile)
            assert found.metadata.shared <= gpu_limits.AMD_SHARED_MEMORY
            assert "v_mfma" in found.asm["amdgcn"]
            assert re.search(r"\.vgpr_spill_count:\s*0\b", found.asm["amdgcn"])


# Whom it serves -------------------------------------------------------------------------------------------------------


def _why(operation: str = "triangle_attention", **more: Any) -> str:
    fields = {"device": "cuda", "capability": (9, 0), "dtype": torch.bfloat16, "d": 32, **more}
    dims = registry.Dims({"m": 0, "h": 4, "d": fields.pop("d")})
    request = registry.Request(operation=operation, dims=dims, **fields)
    return "; ".join(map(str, registry.kernels(operation)["triton"].supports(request)))


@pytest.mark.parametrize("operation", ["triangle_attention", "attention_pair_bias"])
def test_what_it_refuses(operation):
    assert not _why(operation)
    assert not _why(operation, capability=(8, 0), dtype=torch.float32, d=24, grad=True, deterministic=True)
    assert not _why(operation, capability=None), "AMD"
    assert "7.5" in _why(operation, capability=(7, 5))
    assert "float64" in _why(operation, dtype=torch.float64)
    assert "128 is the limit" in _why(operation, d=129)
    assert "not on mps" in _why(operation, device="mps", capability=None)
    assert "not on cpu" in _why(operation, device="cpu", capability=None, dtype=torch.float64)


def test_every_chip_has_its_memory_and_tiles():
    memory = [gpu_limits.shared_memory(chip) for chip in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 3), (12, 1))]
    assert memory == [0, 166_912, 101_376, 101_376, 232_448, 232_448, 101_376]
    for table in tiles.TILES.values():
        for of_width in table.values():
            assert all(len(found) == len(tiles.KERNELS) for found in of_width.values())
