"""Invariant point attention through cuEquivariance, on a stand-in written from its documentation.

As `test_triangle_libraries.py`: here is tested what stands around the library's call, the second pass among it. Whether
the library does what it documents takes a GPU.
"""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from foldkernels.kernels import registry
from foldkernels.kernels.common import blocking
from foldkernels.kernels.hardware.machine import MACHINES
from foldkernels.kernels.invariant_point_attention import cuequivariance as kernel
from foldkernels.kernels.invariant_point_attention import reference
from foldkernels.kernels.registry.types import Dims, Request
from foldkernels.kernels.testing import accuracy

from ..stand_ins import cuequivariance
from . import kernel_cases

Values = dict[str, Any]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = "q k v q_points k_points v_points point_weights z bias_weight mask pair_mask".split()
#: What an error may be beyond twice plain PyTorch's, as a part of the largest value, and by how much that is exceeded.
FLOOR = {F32: 1e-6, BF16: 2e-3, F16: 2e-3}
EXCEEDS = {BF16: accuracy.EXCEEDS["invariant_point_attention", "cuequivariance", BF16]}


@pytest.fixture(autouse=True)
def tf32_is_allowed():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def outcome(run: Callable[..., Any], values: Values, dtype: torch.dtype, wide: bool = False) -> dict[str, Tensor]:
    """The outputs and every gradient, in float64."""
    x: Values = {}
    for name in NAMES:
        value = values[name]
        if value is not None and value.is_floating_point():
            held = F32 if "point" in name else dtype
            value = value.to(held).to(torch.float64 if wide else held).requires_grad_()
        x[name] = value
    outputs = run(*x.values())
    g = torch.Generator().manual_seed(3)
    asked = [torch.randn(out.shape, dtype=torch.float64, generator=g).to(dtype).to(out.dtype) for out in outputs]
    leaves = {name: value for name, value in x.items() if value is not None and value.requires_grad}
    found = torch.autograd.grad(outputs, list(leaves.values()), asked)
    named = {**dict(zip(("values", "points", "pair"), outputs, strict=True)), **dict(zip(leaves, found, strict=True))}
    return {name: value.detach().double() for name, value in named.items()}


def excess(monkeypatch: pytest.MonkeyPatch, library: Any, dtype: torch.dtype, n: int = 9, size: int = 0,
           variant: str = "masked", **more: Any) -> tuple[float, str]:  # fmt: skip
    """The largest error of an output or a gradient, as a part of what it may be, and whose it is."""
    monkeypatch.setattr(kernel, "library", library, raising=False)
    values = kernel_cases.build("invariant_point_attention", n, variant, size, **more).values
    truth = outcome(reference.run, values, dtype, wide=True)
    plain, got = outcome(reference.run, values, dtype), outcome(kernel.run, values, dtype)
    shares = {}
    for name, true in truth.items():
        error, of_plain = (float((x[name] - true).abs().max()) for x in (got, plain))
        largest = float(true.abs().max()) or 1e-30  # with one key, most gradients are nothing at all
        share = error / (EXCEEDS.get(dtype, 1.0) * (2 * of_plain + FLOOR[dtype] * largest))
        shares[name] = share if share == share else float("inf")
    worst = max(shares, key=shares.__getitem__)
    return shares[worst], worst


@pytest.mark.parametrize("variant", ["plain", "masked"])
@pytest.mark.parametrize(
    ("dtype", "n", "size"), [(F32, 9, 0), (F32, 17, 0), (BF16, 17, 0), (BF16, 17, 2), (F16, 17, 0), (BF16, 1, 0)]
)
def test_numbers(dtype, n, size, variant, monkeypatch):
    """Outputs and every gradient; rows without keys, and other widths for values than for queries, among them."""
    share, name = excess(monkeypatch, cuequivariance, dtype, n, size, variant)
    assert share <= 1.0, (name, share)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_far_from_the_origin(dtype, monkeypatch):
    """100 nm: squared norms of 3e4, where 16 bits tell 128 apart."""
    share, name = excess(monkeypatch, cuequivariance, dtype, 17, 0, away=100.0)
    assert share <= 1.0, (name, share)


def test_several_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(blocking, "_PAIRS_PER_THREAD", dict.fromkeys((torch.float32, torch.float64), 14))
    share, name = excess(monkeypatch, cuequivariance, F32, 7)
    assert share <= 1.0, (name, share)


def test_rows_without_keys_are_zero_and_pass_nothing(monkeypatch):
    monkeypatch.setattr(kernel, "library", cuequivariance, raising=False)
    case = kernel_cases.build("invariant_point_attention", 9, "masked", 0)
    found = outcome(kernel.run, case.values, F32)
    for name, gone in zip(("values", "points", "pair"), case.gone_outputs, strict=True):
        assert gone is not None and not found[name][gone].any(), name
    for name, gone in case.gone_values.items():
        assert not found[name][gone].any(), name


# What must be seen ----------------------------------------------------------------------------------------------------


def _changed(change: Callable[[Values], Values]) -> Any:
    """A library whose function gets other arguments than it was called with."""

    def function(*args: Any, **kwargs: Any) -> Tensor:
        bound = inspect.signature(cuequivariance.triangle_attention).bind(*args, **kwargs)
        bound.apply_defaults()
        return cuequivariance.triangle_attention(**change(dict(bound.arguments)))

    return SimpleNamespace(triangle_attention=function)


MUTATIONS: dict[str, Callable[[Values], Values]] = {
    "flipped mask": lambda x: {**x, "mask": ~x["mask"]},
    "lost scale": lambda x: {**x, "scale": None},
    "transposed bias": lambda x: {**x, "bias": x["bias"].transpose(-1, -2)},
    "lost bias": lambda x: {**x, "bias": 0 * x["bias"]},
    "queries and keys exchanged": lambda x: {**x, "q": x["k"], "k": x["q"]},
    "a lost norm": lambda x: {**x, "k": torch.cat([x["k"][..., :10], 0 * x["k"][..., 10:]], -1)},
}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("mistake", sorted(MUTATIONS))
def test_a_mistake_is_seen(mistake, dtype, monkeypatch):
    assert excess(monkeypatch, _changed(MUTATIONS[mistake]), dtype)[0] > 2.0


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("lost", ["q", "k", "z", "bias_weight"])
def test_a_dropped_pair_term_is_seen(lost, dtype, monkeypatch):
    """Without the second pass's gradient, those of queries, keys, z and the bias's weight are wrong."""
    backward = kernel._Attention.backward

    def dropped(ctx: Any, d_out: Tensor, d_pair: Tensor) -> Any:
        whole, without = backward(ctx, d_out, d_pair), backward(ctx, d_out, torch.zeros_like(d_pair))
        place = {"q": 0, "k": 1, "z": 3, "bias_weight": 4}[lost]
        return tuple(without[i] if i == place else x for i, x in enumerate(whole))

    monkeypatch.setattr(kernel._Attention, "backward", staticmethod(dropped))
    share, name = excess(monkeypatch, cuequivariance, dtype)
    assert share > 2.0, (name, share)


def test_float32_gradients_need_tf32(monkeypatch):
    torch.backends.cuda.matmul.allow_tf32 = False  # as it was before, once the test is over
    with pytest.raises(RuntimeError, match=r"allow_tf32 = True"):
        excess(monkeypatch, cuequivariance, F32)


# The choice, on machines as data --------------------------------------------------------------------------------------


def why(n: int = 256, dtype: torch.dtype = BF16, on: str = "h100", **more: Any) -> str:
    sizes = {name: more.pop(name, size) for name, size in {"h": 8, "c": 16, "p": 8, "pv": 12, "cz": 128}.items()}
    there = MACHINES[on]
    capability = more.pop("capability", there.capability)
    request = Request(
        "invariant_point_attention", there.device, dtype, Dims({"n": n, **sizes}), capability=capability, **more
    )
    record = registry.kernels("invariant_point_attention")["cuequivariance"]
    return "; ".join(map(str, registry.reasons_against(record, request, there)))


def test_what_it_refuses():
    """The published widths make 115 columns: 120 with 16 bits, and 52 with 32, which is too many."""
    assert kernel.columns(16, 8, 12, narrow=True) == 120 and kernel.columns(16, 8, 12, narrow=False) == 52
    assert not why() and not why(grad=True, options=frozenset(["pair_mask"])) and not why(101)
    assert "up to 100 tokens" in why(100)
    assert "lifted heads of 52 columns; with 32 bits cuEquivariance takes 32" in why(dtype=F32)
    assert not why(dtype=F32, c=4, p=2, pv=5, n=256) or "tokens" in why(dtype=F32, c=4, p=2, pv=5, n=256)
    assert "lifted heads of 136 columns" in why(c=32)
    assert "computes in tf32" in why(dtype=F32, c=4, p=2, pv=5, grad=True)
    assert "cannot drop logits" in why(options=frozenset(["logit_dropout"]))
    assert "cannot trace" in why(compiled=True)
    assert "differ from run to run" in why(deterministic=True)
    assert "float64" in why(dtype=torch.float64)
    assert "compute capability 10" in why(capability=(10, 0))
    assert "not installed" in why(on="cpu")


def test_presets():
    """`cuequivariance` chooses it for 16 bits and long chains; `auto` waits for a run on a GPU."""
    dims = Dims({"n": 256, "h": 8, "c": 16, "p": 8, "pv": 12, "cz": 128})
    there = MACHINES["h100"]
    request = Request("invariant_point_attention", "cuda", BF16, dims, capability=there.capability)
    assert registry.decide(request, {"preset": "cuequivariance"}, there).kernel.name == "cuequivariance"
    assert registry.decide(request, {"preset": "auto"}, there).kernel.name == "torch"
