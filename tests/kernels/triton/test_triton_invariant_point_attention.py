"""Invariant point attention in Triton: its numbers in Triton's interpreter, its code for four chips, its limits.

No GPU is needed, and none is used: what a chip makes of that code, and how fast, is for the contract test on a GPU.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from foldkernels.configs.presets import candidates
from foldkernels.kernels import registry
from foldkernels.kernels.invariant_point_attention import _tiles as tiles
from foldkernels.kernels.triton_tools import gpu_limits

from ...support.ipa_compiled import Cell, compiled
from ...support.sass import loop
from ...support.triton_tools import Ask, interpreter, right, slow, with_triton, wrong

# Numbers --------------------------------------------------------------------------------------------------------------

PUBLISHED, ODD, WIDE = (8, 16, 8, 12, 128), (3, 4, 2, 5, 6), (2, 70, 3, 2, 20)
PLAIN: dict[str, Any] = {
    "ask": "measure",
    "n": 17, "variant": "masked", "dtype": "float32", "z": None, "sizes": ODD, "lifted": (3, 5, 7, 6),
    "away": 0.0, "fault": "", "twice": False, "programs": 1,
    "fused": True, "queries": 8, "keys": 16, "heads": 8, "warps": 4, "stages": 2, "chunks": 1,
    "descriptors": False,
}  # fmt: skip
both_ways = pytest.mark.parametrize("fused", [True, False], ids=["fused", "wide"])


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Ask the interpreter about a case: `PLAIN`, but for what is named."""
    with interpreter("ipa_interpreter", PLAIN) as answer:
        yield answer


@with_triton
@both_ways
@pytest.mark.parametrize("n", [1, 2, 17, *slow(7, 15, 16, 31, 33)])
def test_lengths(ask, n, fused):
    """Outputs and every gradient, with an odd number of heads and masks of both kinds; each in its type."""
    found = ask(n=n, fused=fused, queries=4 if n < 17 else 8)
    right(found)
    assert all(x["as_plain"] for x in found.values() if isinstance(x, dict))


@with_triton
@pytest.mark.parametrize("variant", ["plain", "transposed", "spread", "expanded"])
def test_layouts(ask, variant):
    right(ask(n=7, variant=variant))


@with_triton
@both_ways
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_16_bits(ask, dtype, fused):
    right(ask(dtype=dtype, fused=fused, n=17 if fused else 7))


@with_triton
@pytest.mark.parametrize("away", [0.0, 100.0], ids=["centred", "100 nm away"])
@pytest.mark.parametrize("z", [None, "bfloat16"], ids=["float32", "bfloat16 z"])
def test_points_far_from_the_origin(ask, z, away):
    """Distances survive a frame far off the origin, beside a narrower z too."""
    right(ask(n=7, z=z, away=away))


@with_triton
@pytest.mark.parametrize(
    ("sizes", "fused"),
    [
        (WIDE, False),
        pytest.param(PUBLISHED, True, marks=pytest.mark.slow),
        pytest.param((12, 16, 4, 8, 128), True, marks=pytest.mark.slow),
        pytest.param((2, 256, 1, 1, 256), False, marks=pytest.mark.slow),
        pytest.param((5, 8, 7, 3, 16), True, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("z", [None, pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_sizes(ask, sizes, fused, z):
    """Heads and channels that are no power of two, wide heads, wide pairs, more heads than a tile has."""
    right(ask(n=5, sizes=sizes, fused=fused, z=z, variant="masked", queries=2))


#: Channels of z that fill rows of 16 bytes.
DESCRIBED = {"dtype": "bfloat16", "descriptors": True, "sizes": (3, 4, 2, 5, 24)}


@with_triton
@pytest.mark.parametrize("n", [1, 7, *slow(2, 15, 16, 17, 31, 33)])
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_descriptors(ask, n, dtype):
    """Outputs and every gradient where the forward pass reads through descriptors, masks of both kinds among them."""
    found = ask(**{**DESCRIBED, "n": n, "dtype": dtype, "queries": 4})
    right(found)
    assert found["described"] == 1
    assert all(x["as_plain"] for x in found.values() if isinstance(x, dict))


@with_triton
@pytest.mark.parametrize(
    "sizes",
    [
        (5, 7, 7, 3, 104),
        pytest.param(PUBLISHED, marks=pytest.mark.slow),
        pytest.param((1, 1, 1, 1, 8), marks=pytest.mark.slow),
        pytest.param((7, 32, 4, 8, 72), marks=pytest.mark.slow),
        pytest.param((2, 33, 3, 2, 200), marks=pytest.mark.slow),
        pytest.param((8, 16, 8, 12, 256), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_descriptors_of_all_sizes(ask, sizes):
    """Heads and channels that are no power of two, an odd number of scalars, wide pairs."""
    found = ask(**{**DESCRIBED, "n": 5, "sizes": sizes, "queries": 2})
    right(found)
    assert found["described"] == 1


@with_triton
@pytest.mark.parametrize("away", [0.0, 100.0], ids=["centred", "100 nm away"])
def test_descriptors_and_points_far_from_the_origin(ask, away):
    """Beside float32 scalars and points, too."""
    found = ask(**{**DESCRIBED, "n": 7, "dtype": "float32", "z": "bfloat16", "away": away})
    right(found)
    assert found["described"] == 1


@with_triton
@pytest.mark.slow
def test_descriptors_and_keys_in_parts(ask):
    """Three parts of keys, joined; a second item, which no tile at an edge reaches into; the same bits again."""
    found = ask(**{**DESCRIBED, "n": 33, "programs": 1000, "queries": 16, "twice": True, "sizes": (1, 4, 2, 3, 8)})
    right(found)
    assert found["described"] == 2
    assert all(x["same"] for x in found.values() if isinstance(x, dict))


@with_triton
@pytest.mark.parametrize(
    ("variant", "sizes", "described"),
    [
        ("spread", DESCRIBED["sizes"], 1),
        ("transposed", DESCRIBED["sizes"], 0),
        ("expanded", DESCRIBED["sizes"], 0),
        ("masked", ODD, 0),
    ],
    ids=["channels apart", "transposed", "expanded", "rows of 12 bytes"],
)
def test_what_no_descriptor_holds_is_read_by_pointers(ask, variant, sizes, described):
    """Channels that lie apart are copied first, as for pointers; the others run without descriptors."""
    found = ask(**{**DESCRIBED, "n": 7, "variant": variant, "sizes": sizes})
    right(found)
    assert found["described"] == described


@with_triton
@pytest.mark.parametrize("fault", ["flipped mask", "lost bias", "lost points", "transposed z", "no scalars"])
def test_the_comparison_sees_a_mistake_beside_descriptors(ask, fault):
    seen = " ".join(wrong(ask(**{**DESCRIBED, "n": 5, "fault": fault, "sizes": (1, 4, 2, 3, 8)})))
    assert all(f"{name}: " in seen for name in ("out", "points", "pair")), seen


@with_triton
def test_what_a_descriptor_holds(ask):
    """By address, strides and sizes alone: see the script's table."""
    found = ask(ask="describable")
    assert found["wrong"] == [] and found["cases"] == 12


@with_triton
@both_ways
def test_keys_in_parts_and_every_run_the_same(ask, fused):
    """Three blocks of keys, one to a program: parts are joined, and each run gives the same bits."""
    found = ask(n=33, variant="plain", programs=1000, fused=fused, twice=True, sizes=(1, 4, 2, 3, 6), queries=16)
    right(found)
    assert all(x["same"] for x in found.values() if isinstance(x, dict))


@with_triton
@pytest.mark.parametrize("fault", ["flipped mask", "lost bias", "lost points", "transposed z", "no scalars"])
@pytest.mark.parametrize("z", [None, "bfloat16"], ids=["float32", "bfloat16 z"])
def test_the_comparison_sees_a_mistake(ask, z, fault):
    seen = " ".join(wrong(ask(n=5, z=z, fault=fault, sizes=(1, 4, 2, 3, 6))))
    names = ("out", "points", "pair", "v", "v_points", "z", "k", "k_points", "bias_weight")
    assert all(f"{name}: " in seen for name in names), seen


@with_triton
@both_ways
@pytest.mark.parametrize("programs", [1, 1000], ids=["whole", "parts"])
def test_z_is_loaded_once_a_pass(ask, programs, fused):
    """Each number of z once forward and once backward; each number of its gradient is written once."""
    assert ask(ask="count", fused=fused, programs=programs) == {
        "forward": [1, 1], "backward": [1, 1], "written": [1, 1]
    }  # fmt: skip


@with_triton
@pytest.mark.parametrize("programs", [1, 1000], ids=["whole", "parts"])
def test_z_is_loaded_once_through_descriptors(ask, programs):
    found = ask(ask="count", **{**DESCRIBED, "z": "bfloat16", "lifted": (3, 5, 7, 24), "programs": programs})
    assert found["forward"] == [1, 1]


@with_triton
def test_offsets_of_descriptors_are_64_bits_wide(ask):
    """Items of z more than 2^31 numbers apart; rows that lie farther apart than items are read by pointers."""
    found = ask(ask="far_apart", axes=["items"], n=3, lifted=(1, 5, 7, 8), z="bfloat16", descriptors=True)
    assert found == {"items": True}


@with_triton
def test_offsets_are_64_bits_wide(ask):
    """Rows, keys and batch items of z more than 2^31 numbers apart."""
    axes = ["rows", "keys", "items"]
    assert ask(ask="far_apart", axes=axes, n=3, lifted=(1, 5, 7, 6), z="bfloat16") == {
        "rows": True,
        "keys": True,
        "items": True,
    }


@with_triton
def test_the_operators_are_sound(ask):
    """PyTorch's own checks; no second derivative, and no gradient that is lost on the way through the lse."""
    found = ask(ask="operators", n=5)
    assert {*found["forward"].values(), *found["backward"].values()} == {"SUCCESS"}, found
    assert "invariant_point_attention: the kernel 'triton' has no second derivative" in found["twice"]
    assert "'reference'" in found["twice"]
    assert found["lse_differentiable"] is False


@with_triton
@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled(ask, autocast):
    """Whole graphs, two at most for three lengths, under autocast too; the same numbers."""
    found = ask(ask="compiled", autocast=autocast)
    assert found["most"] < 1e-5 and found["graphs"] <= 2
    narrow = "torch.bfloat16" if autocast else "torch.float32"
    assert found["types"] == [narrow, "torch.float32", narrow]


# Code for each chip ---------------------------------------------------------------------------------------------------


@with_triton
@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_descriptors_take_half_the_instructions(masked, tmp_path):
    """Instructions of the loop for each pair of residues, on 9.0 at the published size."""
    taken = []
    for described in (0, 32):
        cell = Cell(90, "forward", "bf16", True, 8, 128, described)
        plan = cell.plans()[0]
        body = loop(compiled(cell, plan, "ieee", masked=masked), tmp_path)
        taken.append(len(body) * plan.warps / (plan.queries * plan.keys))
    print(f"by pointers {taken[0]:.1f}, by descriptors {taken[1]:.1f}")
    assert taken[1] < 18
    assert taken[1] < taken[0] / 2


@with_triton
@pytest.mark.parametrize(
    ("kernel", "described"),
    [("forward", 0), ("backward", 0), ("forward", 32)],
    ids=["forward", "backward", "forward with descriptors"],
)
def test_sizes_of_one_compile(kernel, described):
    """One item, one block of keys, one residue: Triton takes a 1 for a constant."""
    cell = Cell(90, kernel, "bf16", True, 8, 128, described)
    assert compiled(cell, cell.plans()[0], "ieee", masked=False, ones=("items", "blocks_a_part", "n")).asm["cubin"]


# Whom it serves -------------------------------------------------------------------------------------------------------


def _why(**more: Any) -> str:
    sizes = {"n": 0, "h": 8, "c": 16, "p": 8, "pv": 12, "cz": 128}
    dims = registry.Dims({name: more.pop(name, size) for name, size in sizes.items()})
    fields = {"device": "cuda", "capability": (9, 0), "dtype": torch.bfloat16, "grad": True, **more}
    request = registry.Request(operation="invariant_point_attention", dims=dims, **fields)
    return "; ".join(map(str, registry.kernels("invariant_point_attention")["triton"].supports(request)))


def test_what_it_refuses():
    assert not _why()
    assert not _why(dtype=torch.float32, deterministic=True, options=frozenset({"pair_mask"}))
    assert not _why(c=256, h=33, cz=256)
    assert "7.5" in _why(capability=(7, 5))
    assert "AMD" in _why(capability=None) and "'torch'" in _why(capability=None)
    assert "float64" in _why(dtype=torch.float64)
    assert "pairs of 257" in _why(cz=257)
    assert "drop logits" in _why(options=frozenset({"logit_dropout"}))
    assert "not on mps" in _why(device="mps", capability=None)
    assert "not on cpu" in _why(device="cpu", capability=None, dtype=torch.float64)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_what_is_served_has_a_tile(capability):
    """Whatever `supports` allows, the launcher finds a way to run; what it does not, is said with the chip's memory."""
    for h, cz, grad in itertools.product((1, 5, 8, 12, 16), (16, 128, 130, 256), (False, True)):
        h = min(h, tiles.heads_at_once(cz))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            why = _why(capability=capability, h=h, cz=cz, dtype=dtype, grad=grad)
            assert not why or f"{gpu_limits.shared_memory(capability):,} bytes" in why
            passes = ("forward", "backward")[: 1 + grad]
            for kernel, z, d in itertools.product(passes, {dtype, torch.bfloat16}, (40, 300)):
                if not why:
                    plans = tiles.plans_for(capability, kernel, z, h=h, cz=cz, d=d, dv=d, points=24)
                    assert plans and len(set(plans)) == len(plans)
                    assert not any(plan.fused and (d == 300 or z is torch.float32) for plan in plans)
                    assert all(plan.heads >= h and plan.queries >= 1 for plan in plans)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0), None])
def test_descriptors_are_for_chips_that_have_them(capability):
    """Never the first choice, never the only one; 16 bits, the forward pass, and widths for which there is a tile."""
    published = {"h": 8, "cz": 128, "d": 40, "dv": 52, "points": 24}

    def described(kernel="forward", dtype=torch.bfloat16, **sizes):
        plans = tiles.plans_for(capability, kernel, dtype, **{**published, **sizes})
        assert not plans[0].descriptors
        return [plan.queries for plan in plans if plan.descriptors]

    if capability is None:
        assert tiles._described(capability, 8, 128, 32) == []
        return
    have = capability in ((9, 0), (10, 0))
    assert described() == ([16, 8] if have else [])
    assert described(d=64, points=48) == ([8, 4] if have else [])
    assert described(cz=256) == ([8, 4] if have else [])
    assert described(kernel="backward") == described(dtype=torch.float32) == described(h=9) == []
    assert described(d=120) == described(dv=65) == described(cz=256, d=64, points=48) == []


def test_published_sizes_are_served_everywhere():
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0)):
        for dtype in (torch.float32, torch.bfloat16):
            assert not _why(capability=capability, dtype=dtype)
        assert tiles.plans_for(capability, "forward", torch.bfloat16, h=8, cz=128, d=40, dv=52, points=24)[0].fused


def test_presets():
    """Asked for by two words; `auto` leaves it out until it has run on a GPU."""
    for preset, first in (("triton", "triton"), ("flash", "triton"), ("auto", "torch"), ("torch", "torch")):
        assert candidates(preset, "invariant_point_attention", "cuda")[0] == first
    assert candidates("flash", "invariant_point_attention", "cpu")[0] == "torch"
