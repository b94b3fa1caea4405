"""The Triton factorised point attention: its numbers in Triton's interpreter, its code for four chips, its limits.

No GPU is needed, and none is used: what a chip makes of that code, and how fast, is for the contract test on a GPU.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from foldkernels.kernels import registry

from ...support.triton_tools import Ask, interpreter, right, slow, with_triton, wrong

PLAIN: dict[str, Any] = {
    "b": 1, "n": 7, "h": 2, "c": 4, "p": 2, "pv": 3, "r": 2, "cp": 3,
    "bias": True, "pair": True, "masked": False, "away": 0.0, "dtype": "float32", "layout": "plain", "fault": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    with interpreter("factorized_interpreter", PLAIN) as found:
        yield found


# Numbers --------------------------------------------------------------------------------------------------------------


@with_triton
@pytest.mark.parametrize("n", [1, 7, 33, *slow(2, 16, 17, 31, 65, 100)])
def test_lengths(ask, n):
    right(ask(n=n))


@with_triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_masks(ask, dtype):
    """Holes, an item that ends in the first of two tiles, an empty one: zeros, and no gradient, where nobody is.

    Every run gives the same bits.
    """
    found = ask(b=3, n=40, masked=True, dtype=dtype, h=1, twice=True)
    right(found)
    assert all(x["same"] for x in found.values() if isinstance(x, dict))
    assert {x["dtype"] for name, x in found.items() if name in ("out 0", "out 2", "d_k")} == {f"torch.{dtype}"}
    assert found["out 1"]["dtype"] == found["d_q_points"]["dtype"] == "torch.float32"


@with_triton
@pytest.mark.parametrize(("bias", "pair"), [(True, False), (False, True), (False, False)])
def test_without_factors(ask, bias, pair):
    right(ask(bias=bias, pair=pair, layout="spread"))


@with_triton
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_wider_than_256(ask, dtype):
    """c_hidden 256, rank 4, 12 value points and c_z 128: several tiles of columns, of queries and of values."""
    right(ask(c=256, r=4, cp=32, p=8, pv=12, h=1, n=18, dtype=dtype))


@with_triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_points_are_never_in_16_bits(ask, dtype):
    """100 nm from the origin, the attended points are right to a hundredth of what 16 bits hold."""
    found = ask(n=17, away=100.0, dtype=dtype, pair=False)
    right(found)
    assert found["out 1"]["error"] < 0.5 / 100


@with_triton
@pytest.mark.parametrize("fault", ["swapped factors", "lost weight"])
def test_the_comparison_sees_a_mistake(ask, fault):
    seen = " ".join(wrong(ask(fault=fault, dtype="bfloat16")))
    assert all(name in seen for name in ("out 0", "out 1", "out 2", "d_q:", "d_k_points", "d_v:")), seen


@with_triton
def test_the_operator_is_one(ask):
    found = ask(operators=True, n=5)
    assert set(found["opcheck"].values()) == {"SUCCESS"}, found["opcheck"]
    assert "factorized_point_attention: the kernel 'triton' has no second derivative" in found["twice"]


# Whom it serves -------------------------------------------------------------------------------------------------------


def _why(options: tuple[str, ...] = ("bias_factors", "pair_factors"), **more: Any) -> str:
    sizes = {"h": 8, "c": 128, "p": 8, "pv": 12, "r": 2, "cp": 32}
    dims = registry.Dims({"n": 0, **{name: more.pop(name, size) for name, size in sizes.items()}})
    fields = {"device": "cuda", "capability": (9, 0), "dtype": torch.bfloat16, **more}
    request = registry.Request(operation="factorized_point_attention", dims=dims, options=frozenset(options), **fields)
    return "; ".join(map(str, registry.kernels("factorized_point_attention")["triton"].supports(request)))


def test_what_it_refuses():
    assert not _why()
    assert not _why(capability=(8, 0), dtype=torch.float32, c=512, r=16, cp=128, grad=True, deterministic=True)
    assert "7.5" in _why(capability=(7, 5))
    assert "NVIDIA's" in _why(capability=None)
    assert "float64" in _why(dtype=torch.float64)
    assert "not on cpu" in _why(device="cpu", capability=None)
    assert "cannot round as FlashIPA does" in _why(options=("plain_lifting",))
    assert "66 columns of float32, and 64 is its limit" in _why(pv=22)
    assert "kernel 'torch', which has none" in _why(p=21)
