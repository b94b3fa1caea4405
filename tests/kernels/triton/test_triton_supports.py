"""Whom the Triton kernels serve: what `supports` lets through has tiles that fit the chip, and the rest a reason."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foldkernels.kernels import registry
from foldkernels.kernels.biased_attention import _tiles as biased
from foldkernels.kernels.edge_transition import _tiles as edge
from foldkernels.kernels.factorized_point_attention import _tiles as factorized
from foldkernels.kernels.hardware.machine import MACHINES, Machine
from foldkernels.kernels.invariant_point_attention import _tiles as ipa
from foldkernels.kernels.registry.types import Dims, Reason, Request
from foldkernels.kernels.triton_tools import gpu_limits

from ...support import usage_table
from ...support.triton_tools import CHIPS

#: Every operation's sizes, far beyond what anyone has.
SIZES: dict[str, dict[str, int]] = {
    "triangle_attention": {"m": 2048, "h": 64, "d": 400},
    "attention_pair_bias": {"n": 2048, "h": 64, "d": 400},
    "edge_transition": {"n": 2048, "cn": 700, "cz": 300, "cz_out": 300},
    "factorized_point_attention": {"n": 8192, "h": 64, "c": 600, "p": 40, "pv": 40, "r": 40, "cp": 300},
    "invariant_point_attention": {"n": 2048, "h": 64, "c": 600, "p": 40, "pv": 40, "cz": 400},
}
CAPABILITIES = (None, (7, 0), (7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1))
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {"factorized_point_attention": ("bias_factors", "pair_factors", "plain_lifting"),
           "invariant_point_attention": ("pair_mask", "logit_dropout")}  # fmt: skip


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Any request on a GPU."""
    operation = draw(st.sampled_from(sorted(SIZES)))
    dims = {name: draw(st.integers(1, most)) for name, most in SIZES[operation].items()}
    options = [name for name in OPTIONS.get(operation, ()) if draw(st.integers(0, 3)) == 0]
    return Request(
        operation=operation,
        device="cuda",
        capability=draw(st.sampled_from(CAPABILITIES)),
        dtype=draw(st.sampled_from(TYPES)),
        precision=draw(st.sampled_from(("float32", "tf32", "bfloat16"))),
        grad=draw(st.booleans()),
        dims=Dims(dims),
        options=frozenset(options),
    )


def reasons(request: Request) -> list[Reason]:
    return registry.kernels(request.operation)["triton"].supports(request)


def tiles_of(request: Request) -> list[list[Any]]:
    """The tiles of each kernel that a launcher would ask for."""
    dims, chip, dtype = request.dims, request.capability, request.dtype
    if request.operation in ("triangle_attention", "attention_pair_bias"):
        names = biased.KERNELS if request.grad else biased.KERNELS[:1]
        return [list(biased.tiles_for(chip, name, dtype, dims["d"])) for name in names]
    if request.operation == "edge_transition":
        assert chip is not None
        names = edge.KERNELS if request.grad else edge.KERNELS[:1]
        return [list(edge.tiles_for(chip, name)) for name in names]
    if request.operation == "factorized_point_attention":
        names = factorized.KERNELS if request.grad else factorized.KERNELS[:1]
        features = 3 * dims["p"] + dims["r"]
        return [list(factorized.tiles_for(chip, name, dtype, features)) for name in names]
    heads = min(dims["h"], ipa.heads_at_once(dims["cz"]))
    lifted, values = dims["c"] + 3 * dims["p"], dims["c"] + 3 * dims["pv"]
    sizes = {"h": heads, "cz": dims["cz"], "d": lifted, "dv": values, "points": 3 * dims["p"]}
    passes = ("forward", "backward") if request.grad else ("forward",)
    # z may be narrower than the rest.
    return [list(ipa.plans_for(chip, name, z, **sizes)) for name in passes for z in {dtype, torch.bfloat16}]


@settings(max_examples=400, deadline=None)
@given(requests())
def test_what_is_served_has_tiles(request):
    """The launcher finds what it asks for; whoever is refused is told why in a sentence without a full stop."""
    why = reasons(request)
    assert all(reason.why and not reason.why.endswith(".") for reason in why)
    if why:
        return
    assert gpu_limits.shared_memory(request.capability) > 0
    for tiles in tiles_of(request):
        assert tiles and len(set(tiles)) == len(tiles)
        for tile in tiles:
            fields = tile._asdict()
            assert {fields["warps"]} <= {4, 8} and fields["stages"] in (1, 2, 3)
            rows = [fields[name] for name in ("queries", "rows", "keys", "columns") if name in fields]
            assert all(size & (size - 1) == 0 and size > 0 for size in rows)


@settings(max_examples=200, deadline=None)
@given(requests())
def test_old_chips_and_types_are_refused(request):
    words = " ".join(map(str, reasons(request)))
    if request.capability is not None and request.capability < gpu_limits.OLDEST:
        assert "compute capability 8.0 or more" in words
    if request.dtype is torch.float64:
        assert "not in float64" in words


@pytest.mark.parametrize("operation", usage_table.MODULES)
def test_what_was_compiled_fits_every_chip_that_reads_it(operation):
    """Chips that were not compiled for read the tiles of one that was, and have as much memory."""
    most = {f"sm_{arch}": gpu_limits.shared_memory(capability) for arch, capability in CHIPS.items()}
    for name, found in usage_table.read(operation).items():
        assert name in usage_table.HEADS or found[0] <= most[name.split()[0]], name
    twins = {(8, 6): (8, 9), (8, 7): (8, 0), (10, 3): (10, 0), (12, 0): (8, 9), (12, 1): (8, 9)}
    for capability, like in twins.items():
        assert gpu_limits.shared_memory(capability) == gpu_limits.shared_memory(like)
        assert edge.tiles_for(capability, "forward") == edge.tiles_for(like, "forward")


def without_triton(version: str | None) -> Machine:
    """An H100 whose Triton is another, or missing."""
    there = MACHINES["h100"]
    packages = {name: known for name, known in there.packages.items() if name != "triton"}
    return dataclasses.replace(there, packages=packages | ({"triton": version} if version else {}))


@pytest.mark.parametrize("operation", sorted(SIZES))
@pytest.mark.parametrize(("version", "said"), [(None, "not installed"), ("3.1.0", "3.1.0")])
def test_triton_missing_or_too_old(operation, version, said):
    """A reason in the decision, and the preset's next kernel."""
    small = Dims(dict.fromkeys(SIZES[operation], 16))
    request = Request(operation, "cuda", torch.bfloat16, small, capability=(9, 0))
    decision = registry.decide(request, {"preset": "triton"}, without_triton(version))
    assert decision.kernel.name == "torch"
    (why,) = [found for name, found in decision.rejected if name == "triton"]
    assert said in " ".join(map(str, why))
    assert registry.decide(request, {"preset": "triton"}, MACHINES["h100"]).kernel.name == "triton"
