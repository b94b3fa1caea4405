"""flash-attn behind `attention`, on a stand-in written from its documentation.

Here is tested the translation: packing, layouts, what is masked, what is rounded. Whether the library does what it
documents takes a GPU.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from foldkernels.kernels import registry
from foldkernels.kernels.attention import flash_attn as kernel
from foldkernels.kernels.attention import reference
from foldkernels.kernels.common.flash_attn_varlen import Packing
from foldkernels.kernels.hardware import machine
from foldkernels.kernels.hardware.machine import Machine
from foldkernels.kernels.registry.types import Dims, Request
from foldkernels.kernels.testing.cases.random_inputs import Draws

from ..stand_ins import flash_attn as stand_in

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
GPU = Machine("a GPU", "cuda", (8, 0), packages={"torch": "2.13.0", "flash-attn": "2.8.3"})


def inputs(masked: bool = True, dtype: torch.dtype = F64) -> tuple[Any, ...]:
    """q, k, v and a mask with holes, a padded item and an empty one."""
    r = Draws(5)
    b, n, h, d = 4, 9, 3, 10
    mask = None
    if masked:
        i = torch.arange(n)
        mask = torch.stack([i % 3 > 0, i < 6, i < 0, i >= 2])
    return *(r.normal(b, n, h, d).to(dtype).requires_grad_() for _ in range(3)), mask


def outcome(run: Any, given: tuple[Any, ...]) -> list[Tensor]:
    out = run(*given)
    cotangent = torch.randn(out.shape, dtype=F64, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, given[:3], cotangent)]


def worst(found: list[Tensor], true: list[Tensor]) -> float:
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(found, true, strict=True))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "library", stand_in, raising=False)


@pytest.mark.parametrize("masked", [True, False])
def test_the_translation_is_right(masked, library):
    """Forward and every gradient; NaN behind the last sequence goes nowhere."""
    given = inputs(masked)
    assert worst(outcome(kernel.run, given), outcome(reference.run, given)) < 1e-12


def test_masked_tokens_get_zeros_and_pass_nothing(library):
    given = inputs()
    for found in outcome(kernel.run, given):
        assert found.isfinite().all() and not found[~given[3]].any() and found[given[3]].any()


def test_what_masked_tokens_hold_is_not_seen(library):
    q, k, v, mask = (x.detach() for x in inputs())
    before = kernel.run(q, k, v, mask)
    spoilt = [x.masked_fill(~mask[:, :, None, None], torch.nan) for x in (q, k, v)]
    assert torch.equal(kernel.run(*spoilt, mask), before)


def test_float32_is_rounded_to_bfloat16(library):
    given = inputs(dtype=F32)
    found, true = outcome(kernel.run, given), outcome(reference.run, given)
    assert {x.dtype for x in found} == {F32}
    assert 1e-6 < worst(found, true) < 0.1


@pytest.mark.parametrize("name", ["cu_seqlens_q", "softmax_scale", "q", "k", "v"])
def test_a_wrong_translation_is_seen(name, monkeypatch):
    def wrong(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        x = {"q": q, "k": k, "v": v, **more}
        if name == "cu_seqlens_q":
            starts = x["cu_seqlens_q"].clone()
            starts[1] += 1
            x["cu_seqlens_q"] = x["cu_seqlens_k"] = starts.clamp(max=int(starts[-1]))
        else:
            x[name] = 1.0 if name == "softmax_scale" else x[name].roll(1, 0)
        return stand_in.flash_attn_varlen_func(**x)

    monkeypatch.setattr(kernel, "library", SimpleNamespace(flash_attn_varlen_func=wrong), raising=False)
    given = inputs()
    difference = outcome(kernel.run, given)[0] - outcome(reference.run, given)[0]
    assert not float(difference.abs().max()) < 1e-3


def test_packing_and_back():
    r = Draws(3)
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[2] = False
    packing = Packing.of(mask)
    x = r.normal(5, 7, 2)
    packed = packing.pack(x)
    assert packing.starts.tolist() == [0, *mask.sum(1).cumsum(0).tolist()] and packing.starts.dtype is torch.int32
    assert torch.equal(packed[: int(mask.sum())], x[mask]), "sequences stand one behind another, in their order"
    assert torch.equal(packing.unpack(packed, 5), x)
    # Nothing is read back from the device: on one without data, everything still has its shape.
    assert Packing.of(mask.to("meta")).pack(x.to("meta")).shape == (35, 2)


def test_the_packing_is_one_graph():
    def there_and_back(x: Tensor, mask: Tensor) -> Tensor:
        packing = Packing.of(mask)
        return packing.unpack(packing.pack(x), x.shape[0])

    torch._dynamo.reset()
    x, mask = torch.randn(2, 5, 3), torch.rand(2, 5) < 0.5
    torch.testing.assert_close(torch.compile(there_and_back, backend="eager", fullgraph=True)(x, mask), x)
    torch._dynamo.reset()


def test_the_library_is_found_when_it_is_loaded(monkeypatch):
    module = ModuleType("flash_attn")
    module.__dict__.update(flash_attn_func=print, flash_attn_varlen_func=stand_in.flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.delattr(kernel, "library", raising=False)
    machine.refresh()
    try:
        assert kernel.load() is kernel.run and kernel.library is module
        monkeypatch.delattr(module, "flash_attn_varlen_func")  # as flash-attn-4 has none
        machine.refresh()
        with pytest.raises(machine.PackageUnusable, match="flash_attn_varlen_func"):
            kernel.load()
    finally:
        monkeypatch.undo()
        machine.refresh()


def decision(config: Any = "flash", dtype: torch.dtype = BF16, d: int = 64, on: Machine = GPU, **more: Any) -> Any:
    capability = more.pop("capability", on.capability)
    request = Request("attention", on.device, dtype, Dims({"n": 64, "h": 4, "d": d}), capability, **more)
    return registry.decide(request, config, on)


def test_the_choice():
    assert decision().kernel.name == decision(dtype=F16, d=256, grad=True).kernel.name == "flash_attn"
    assert decision(dtype=F32, precision="bfloat16").kernel.name == "flash_attn"
    assert decision("auto").kernel.name == decision("torch").kernel.name == "torch"
    mac = decision(on=machine.MACHINES["mac"])
    assert mac.kernel.name == "torch" and not mac.fell_back


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"dtype": F32}, "the tensors are float32"),
        ({"dtype": F64, "precision": "bfloat16"}, "the tensors are float64"),
        ({"capability": (7, 5)}, "8.0 or newer, this GPU has 7.5"),
        ({"capability": None}, "none of theirs"),
        ({"d": 257}, "257 channels are wider than 256"),
        ({"options": frozenset(["dropout"])}, "dropout of its own"),
        ({"deterministic": True}, "differ from run to run"),
        ({"on": machine.MACHINES["cpu"]}, "the tensors are on cpu"),
        ({"on": machine.MACHINES["h100"]}, "not installed"),
    ],
)
def test_what_it_cannot_do_is_said(more, why):
    assert decision(**more).kernel.name == "torch"
    with pytest.raises(registry.KernelUnavailable, match=why) as refusal:
        decision({"attention": "flash_attn"}, **more)
    assert "fix:" in str(refusal.value)
