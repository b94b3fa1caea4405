"""What every kernel says of itself, and what is chosen on machines that are not here."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from foldkernels.configs.kernel import KernelConfig
from foldkernels.configs.presets import OPERATIONS, PRESETS, candidates
from foldkernels.kernels import registry
from foldkernels.kernels.attention import attention
from foldkernels.kernels.hardware import machine
from foldkernels.kernels.hardware.machine import MACHINES
from foldkernels.kernels.registry import (
    KernelUnavailable,
    decide,
    kernels,
    operations,
    record_kernels,
    thresholds,
    token,
)
from foldkernels.kernels.registry.types import Dims, Reason, Request

from ..support.requested import (
    every_request,
    registry_as_it_was,  # noqa: F401 - an autouse fixture
    request_for,
)
from ..support.standins import from_16_on, stand_in

# ----------------------------------------------------------------------------------------------------- what kernels say


def test_an_exception_in_supports_is_an_error() -> None:
    """Never a quiet rejection: a typo in it must not cost the user the kernel."""

    def broken(request: Request) -> list[Reason]:
        raise AttributeError("'Request' object has no attribute 'lenght'")

    stand_in("torch", broken)
    for config in ("torch", "auto", {"attention": "torch"}):
        with pytest.raises(AttributeError, match="lenght"):
            decide(request_for(), config)


def test_a_kernel_without_a_backward_serves_inference_only() -> None:
    """With gradients it is rejected with a reason; without, it runs; the function looked up follows the mode."""
    stand_in("torch", backward=False)
    assert decide(request_for(), "torch").kernel.name == "torch"
    decision = decide(request_for(grad=True), "torch")
    assert decision.kernel.name == "reference"
    assert decision.rejected == (
        ("torch", (Reason("it has no backward pass", "run under torch.no_grad(), or choose another kernel"),)),
    )
    x = torch.randn(1, 3, 2, 4, requires_grad=True)
    with record_kernels() as ran:
        attention(x, x, x)
        with torch.no_grad():
            attention(x, x, x)
        attention(x.detach(), x.detach(), x.detach())
    assert ran == ["attention: reference", "attention: torch", "attention: torch"]


def test_deterministic_asks_for_kernels_that_are() -> None:
    """`deterministic: true` rejects the others, with what to do; false takes them."""
    stand_in("torch", deterministic=False)
    assert decide(request_for(), "torch").kernel.name == "torch"
    decision = decide(request_for(deterministic=True), "torch")
    assert decision.rejected == (
        ("torch", (Reason("its results differ from run to run", "set deterministic: false"),)),
    )
    x = torch.randn(1, 3, 2, 4)
    with record_kernels() as ran:
        attention(x, x, x, config=token(KernelConfig(preset="torch", deterministic=True)))
        attention(x, x, x, config=token(KernelConfig(preset="torch")))
    assert ran == ["attention: reference", "attention: torch"]


def test_a_missing_package_is_told_with_its_fix() -> None:
    """For this machine by trying it, for another by its description, and the fix is that machine's."""
    stand_in("torch", needs=("trifast>=0.1.13",))
    stand_in("later", needs=("trifast>=99",))
    mac, h100 = MACHINES["mac"], MACHINES["h100"]
    rejected = decide(request_for(device="mps"), "torch", mac).rejected
    ((name, (reason,)),) = rejected
    assert (name, reason.why) == ("torch", "trifast>=0.1.13: not installed on Apple M3 Max")
    assert reason.fix == mac.fix("trifast>=0.1.13") and "Linux only" in reason.fix
    assert decide(request_for(device="cuda", capability=(9, 0)), "torch", h100).kernel.name == "torch"
    with pytest.raises(KernelUnavailable) as caught:
        decide(request_for(device="cuda", capability=(9, 0)), {"attention": "later"}, h100)
    assert "is 0.1.13" in str(caught.value) and "fix: pip install 'trifast>=99'" in str(caught.value)


def test_what_is_installed_later_counts_after_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's findings are asked for at each decision, never kept in the record."""
    stand_in("torch", needs=("trifast",))
    monkeypatch.setattr(machine, "usable", lambda requirement: f"{requirement}: broken")
    monkeypatch.setattr(machine, "fix", lambda requirement: "mend it")
    assert decide(request_for(), "torch").rejected == (("torch", (Reason("trifast: broken", "mend it"),)),)
    monkeypatch.setattr(machine, "usable", lambda requirement: None)
    assert decide(request_for(), "torch").rejected == ()


@pytest.mark.parametrize("operation", sorted(operations()))
def test_supports_takes_data_only(operation: str) -> None:
    """No `supports` makes a tensor, or asks torch to compute anything: run where both raise."""

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(f"it runs {func}")

    class RefuseFunctions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(f"it calls {func}")

    with pytest.raises(AssertionError, match=r"it (runs|calls)"), Refuse(), RefuseFunctions():
        torch.zeros(1)
    requests = list(every_request(operation, (0, 1, 64, 1000)))
    with Refuse(), RefuseFunctions():
        for kernel in kernels(operation).values():
            for request in requests:
                reasons = kernel.supports(request)
                assert isinstance(reasons, list)
                assert all(isinstance(reason, Reason) and reason.why for reason in reasons)


@pytest.mark.parametrize("operation", sorted(operations()))
def test_supports_changes_its_mind_at_thresholds_only(operation: str) -> None:
    """Within a length class the answer is one: the class's shortest length is what gets decided."""
    edges = (0, *thresholds(operation), 5000)
    assert list(edges) == sorted(set(edges))
    for kernel in kernels(operation).values():
        for request in every_request(operation):
            for low, high in itertools.pairwise(edges):
                # All lengths for one request of a kind; the ends, and some between, for all requests.
                plain = request.dtype is torch.float32 and not request.compiled and request.precision == "float32"
                inside = range(low, min(high, low + 300)) if plain else range(low, min(high, low + 20), 5)
                lengths = (*inside, (low + high) // 2, high - 1)
                answers = {tuple(kernel.supports(with_length(request, n))) for n in lengths}
                assert len(answers) == 1, (kernel.name, request, low, high)


def with_length(request: Request, n: int) -> Request:
    return replace(request, dims=Dims({**request.dims, operations()[request.operation].length: n}))


def test_a_threshold_that_is_not_declared_is_seen() -> None:
    """The test above, on a kernel that breaks the rule."""
    stand_in("sly", from_16_on)
    with pytest.raises(AssertionError, match="sly"):
        test_supports_changes_its_mind_at_thresholds_only("attention")


@pytest.mark.parametrize("operation", sorted(operations()))
def test_every_kernel_is_what_its_file_says(operation: str) -> None:
    """Named as its file, loaded to a module-level function, with the reference among them, for every request."""
    assert "reference" in kernels(operation)
    for name, kernel in kernels(operation).items():
        assert (kernel.operation, kernel.name) == (operation, name)
        module = sys.modules[f"foldkernels.kernels.{operation}.{name}"]
        assert kernel.load.__module__ == module.__name__
        if registry.reasons_against(kernel, request_for(operation)) == ():
            assert callable(kernel.load()) and kernel.load() is kernel.load()
    reference = kernels(operation)["reference"]
    assert all(not registry.reasons_against(reference, request) for request in every_request(operation))
    assert set(operations()[operation].dims) >= {operations()[operation].length}


# -------------------------------------------------------------------------------------------- choices of other machines


#: What `auto`, `flash` and `torch` choose in float32 and bfloat16, for inference and training.
CHOICES = {
    "h100": dict.fromkeys(OPERATIONS, "torch"),
    "a100": dict.fromkeys(OPERATIONS, "torch"),
    "rtx4090": dict.fromkeys(OPERATIONS, "torch"),
    "mac": dict.fromkeys(OPERATIONS, "torch"),
    "cpu": dict.fromkeys(OPERATIONS, "torch"),
}


#: What runs where a call uses an optional feature that the first choice lacks.
WITH_OPTIONS = {("invariant_point_attention", "logit_dropout"): "reference"}


@pytest.mark.parametrize("name", sorted(MACHINES))
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_choices_of_machines_that_are_not_here(name: str, preset: str) -> None:
    """An H100, an A100, an RTX 4090, a Mac and a bare CPU, as data: no silent surprise when a list changes."""
    on = MACHINES[name]
    for operation in OPERATIONS:
        options = [frozenset(), *(frozenset({option}) for option in operations()[operation].options)]
        for dtype, grad, used in itertools.product((torch.float32, torch.bfloat16), (False, True), options):
            request = request_for(
                operation, on.device, capability=on.capability, dtype=dtype, grad=grad, options=used, n=256
            )
            decision = decide(request, preset, on)
            lacking = [WITH_OPTIONS[operation, option] for option in used if (operation, option) in WITH_OPTIONS]
            if not (on.device == "cuda" and PRESETS[preset][operation]["cuda"][0] not in ("torch", "reference")):
                # The libraries' limits are held by tests of their own.
                expected = "reference" if preset == "reference" else (lacking or [CHOICES[name][operation]])[0]
                assert decision.kernel.name == expected, str(decision)
            assert decision.source == f"preset {preset}"
            # Never in silence: whatever stands before it in the device's list is there with a reason.
            before = candidates(preset, operation, on.device)[: len(decision.rejected)]
            assert tuple(name for name, _ in decision.rejected) == before
            assert all(reasons for _, reasons in decision.rejected)


@pytest.mark.parametrize("name", sorted(MACHINES))
def test_the_fused_pass_is_for_cpus(name: str) -> None:
    """Elsewhere the two operations run one after the other, and the fused kernel says why."""
    on = MACHINES[name]
    request = request_for("edge_transition_attention", on.device, capability=on.capability)
    decision = decide(request, "auto", on)
    if on.device == "cpu":
        assert decision.kernel.name == "torch"
    else:
        assert decision.kernel.name == "reference" and "CPU only" in str(decision)


@pytest.mark.parametrize("operation", ["attention", "edge_features", "factorized_point_attention"])
def test_deterministic_training_on_cuda_takes_no_float_atomics(operation: str) -> None:
    """`index_add_` and the backward pass of PyTorch's fused attention add up in whatever order blocks end."""
    for device, grad in (("cuda", True), ("cuda", False), ("cpu", True), ("mps", True)):
        request = request_for(operation, device=device, grad=grad, deterministic=True)
        chosen = decide(request, {"preset": "torch", "fallback": "silent"}).kernel.name
        assert (chosen == "reference") is (device == "cuda" and grad), (device, grad, chosen)
        loose = request_for(operation, device=device, grad=grad)
        assert decide(loose, "torch").kernel.name != "reference"
