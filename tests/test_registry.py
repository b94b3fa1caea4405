"""The registry: what it chooses, for any machine, what it says about it, and that it never chooses in silence."""

from __future__ import annotations

import itertools
import os
import pickle
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from foldkernels.configs.kernel import KernelConfig
from foldkernels.configs.presets import OPERATIONS, PRESETS, candidates
from foldkernels.configs.resolve import ENVIRONMENT_VARIABLE, ConfigError
from foldkernels.kernels import machine, registry
from foldkernels.kernels.attention import attention
from foldkernels.kernels.machine import MACHINES
from foldkernels.kernels.registry import (
    KernelUnavailable,
    broken_plugins,
    common_kernel,
    decide,
    function_for,
    kernels,
    length_class,
    operations,
    precision,
    record_kernels,
    register,
    register_operation,
    settings_of,
    thresholds,
    token,
)
from foldkernels.kernels.requests import Decision, Dims, Kernel, Operation, Reason, Request
from foldkernels.kernels.tensors import constant, under_autocast, without_autocast

from .support.goldens import batch_of, small_model
from .support.standins import from_16_on, load_a, load_b, refuses, restored, run_a, run_b, serves, stand_in

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


@pytest.fixture(autouse=True)
def registry_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test may register what it likes; and the environment says nothing."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    with restored():
        yield


def sizes_of(operation: str, n: int = 64) -> Dims:
    """Sizes of the published model's kind, with the length."""
    common = {"h": 8, "c": 16, "p": 8, "pv": 12, "cz": 128, "cz_out": 128, "cn": 128, "d": 64, "f": 64, "bins": 22}
    return Dims({name: common.get(name, 32) for name in operations()[operation].dims} | {"n": n})


def request_for(operation: str = "attention", device: str = "cpu", n: int = 64, **fields: Any) -> Request:
    return Request(operation, device, fields.pop("dtype", torch.float32), sizes_of(operation, n), **fields)


def every_request(operation: str, lengths: tuple[int, ...] = (64,)) -> Iterator[Request]:
    """Devices and their capabilities, floating types, precision, gradients, options: all of them with each other."""
    places = [("cpu", None), ("mps", None), ("meta", None), ("xpu", None)]
    places += [("cuda", capability) for capability in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), None)]
    options = operations()[operation].options
    chosen = [frozenset(c) for size in range(len(options) + 1) for c in itertools.combinations(options, size)]
    flags = (False, True)
    for (device, capability), dtype, grad, compiled, deterministic, words, option, n in itertools.product(
        places, DTYPES, flags, flags, flags, ("float32", "tf32", "bfloat16"), chosen, lengths
    ):
        yield Request(
            operation, device, dtype, sizes_of(operation, n), capability, words, grad, compiled, deterministic, option
        )


# ------------------------------------------------------------------------------------------------------ data, and text


def test_every_request_is_hashable_and_survives() -> None:
    """A request, a decision and a kernel are data: equal ones are one key, and they pickle."""
    for operation in operations():
        request, same, other = request_for(operation), request_for(operation), request_for(operation, n=65)
        assert request == same and hash(request) == hash(same) and request != other
        assert {request: 1, other: 2}[same] == 1
        decision = decide(request, "reference")
        assert {decision: 1}[decide(same, "reference")] == 1
        assert pickle.loads(pickle.dumps((request, decision))) == (request, decision)


def test_dims_are_a_mapping() -> None:
    """In the order given, and different in another."""
    dims = Dims({"n": 3, "h": 2})
    assert dict(dims) == {"n": 3, "h": 2} and list(dims) == ["n", "h"] and len(dims) == 2 and dims["h"] == 2
    assert isinstance(dims, Mapping) and "c" not in dims and dims.get("c") is None
    assert dims != {"n": 3, "h": 2} and dims == Dims({"n": 3, "h": 2}) != Dims({"n": 3, "h": 3})
    with pytest.raises(KeyError, match="c"):
        dims["c"]


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (
            Request("attention", "cpu", torch.float32, Dims({"n": 5, "h": 4, "d": 8})),
            "attention on cpu, float32, n=5 h=4 d=8",
        ),
        (
            Request(
                "attention", "cuda", torch.bfloat16, Dims({"n": 5}), (9, 0), "tf32", True, True, True,
                frozenset({"b", "a"}),
            ),
            "attention on cuda 9.0, bfloat16, n=5, with gradients, compiled, deterministic, precision tf32, with a, b",
        ),
    ],
)  # fmt: skip
def test_a_request_reads_as_a_sentence(request_: Request, text: str) -> None:
    """With what is out of the ordinary, and nothing else."""
    assert str(request_) == text


def test_a_decision_says_what_runs_and_why_nothing_better() -> None:
    """Every reason against every candidate before it, with its fix if there is one."""
    stand_in("torch", refuses)
    decision = decide(request_for(), "torch")
    assert isinstance(decision, Decision) and decision.kernel.name == "reference" and decision.fell_back
    assert str(decision).splitlines() == [
        "attention on cpu, float32, n=64 h=8 d=64: reference (preset torch)",
        "  not torch: it never runs (fix: wait)",
        "  not torch: and the moon is full",
    ]
    assert str(Reason("why", "fix")) == "why (fix: fix)" and str(Reason("why")) == "why"
    first = decide(request_for(), "reference")
    assert str(first) == "attention on cpu, float32, n=64 h=8 d=64: reference (preset reference)"
    assert not first.fell_back and first.rejected == ()


def test_no_kernel_prints_the_request_then_each_kernel_with_why_and_fix() -> None:
    """As xFormers does it: one screen, from which a user can go on."""
    stand_in("torch", refuses)
    stand_in("reference", from_16_on, needs=("no-such-package>=2",))
    with pytest.raises(KernelUnavailable) as caught:
        decide(request_for(n=3, grad=True), "torch")
    assert str(caught.value).splitlines() == [
        "No kernel can run this.",
        "  asked for: attention on cpu, float32, n=3 h=8 d=64, with gradients",
        "  chosen by: preset torch",
        "  torch cannot:",
        "    - it never runs",
        "      fix: wait",
        "    - and the moon is full",
        "  reference cannot:",
        "    - no-such-package>=2: not installed (no module `no_such_package`)",
        "      fix: pip install 'no-such-package>=2'",
        "    - it serves 16 residues or more",
        "      fix: use more residues",
    ]


# ------------------------------------------------------------------------------------------ what the configuration asks


def test_a_required_kernel_runs_or_raises() -> None:
    """It is the only candidate, whatever the preset; an unknown one is an error that names the nearest."""
    stand_in("special")
    decision = decide(request_for(), {"preset": "reference", "attention": "special"})
    assert (decision.kernel.name, decision.source) == ("special", "required by attention: special")
    assert decide(request_for("edge_transition"), {"attention": "special"}).kernel.name == "torch"
    stand_in("special", refuses)
    for fallback in ("warn", "error", "silent"):
        with pytest.raises(KernelUnavailable, match=r"required by attention: special[\s\S]*- it never runs") as caught:
            decide(request_for(), {"attention": "special", "fallback": fallback})
        assert "reference" not in str(caught.value)
    with pytest.raises(KernelUnavailable, match=r"attention has no kernel 'tritn'[\s\S]*Known: .*reference"):
        decide(request_for(), {"attention": "tritn"})
    with pytest.raises(KernelUnavailable, match="did you mean 'torch'"):
        decide(request_for(), {"attention": "troch"})


def test_fallback_error_forbids_what_could_run() -> None:
    """`error` raises where `warn` and `silent` go on; where the first choice runs, it changes nothing."""
    config = {"preset": "torch", "fallback": "error"}
    assert decide(request_for(), config).kernel.name == "torch"
    stand_in("torch", refuses)
    with pytest.raises(KernelUnavailable, match=r"preset torch, fallback: error[\s\S]*it never runs"):
        decide(request_for(), config)
    for fallback in ("warn", "silent"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # deciding never warns: bind does, once
            assert decide(request_for(), config | {"fallback": fallback}).kernel.name == "reference"


def test_reference_never_falls_back() -> None:
    """What cannot be served by the definition is not served by anything else."""
    stand_in("reference", refuses)
    with pytest.raises(KernelUnavailable) as caught:
        decide(request_for(), "reference")
    assert "torch cannot" not in str(caught.value)


def test_the_environment_decides_where_nobody_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a word in it that is wrong is an error, at the first use too."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert decide(request_for()).kernel.name == "reference"
    assert decide(request_for(), "torch").kernel.name == "torch"
    x = torch.randn(1, 3, 2, 4)
    with record_kernels() as ran:
        attention(x, x, x)
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch, precision=bfloat16")
        attention(x, x, x)
        assert precision("") == "bfloat16" and precision(token(KernelConfig())) == "float32"
    assert ran == ["attention: reference", "attention: torch"]
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reverence")
    with pytest.raises(ConfigError, match="did you mean 'reference'"):
        attention(x, x, x)
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    with record_kernels() as ran:
        attention(x, x, x)
        monkeypatch.setattr(os, "environ", {ENVIRONMENT_VARIABLE: "reference"})  # a plain mapping in its place
        attention(x, x, x)
    assert ran == ["attention: torch", "attention: reference"]


def test_answers_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each length, or a service that has seen every length would never stop growing."""
    monkeypatch.setattr(registry, "_MOST_ANSWERS", 8)
    for n in range(1, 40):
        x = torch.zeros(1, n, 1, 4)
        with record_kernels() as ran:
            attention(x, x, x, config=token(KernelConfig(preset="reference")))
        assert ran == ["attention: reference"]
        assert len(registry._decided) <= 9


def test_constants_are_marked_as_pytorch_marks_them() -> None:
    """By an attribute that is PyTorch's own business: its decorator would load all of Dynamo."""

    def theirs() -> None: ...

    def ours() -> None: ...

    assert vars(torch.compiler.assume_constant_result(theirs)) == vars(constant(ours)) != {}


# --------------------------------------------------------------------------------------------------- what kernels say


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


# ------------------------------------------------------------------------------------------- choices of other machines

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


# -------------------------------------------------------------------------------------------------------- registration


def test_register_takes_a_record_or_its_fields() -> None:
    """One of the same name takes its place, also where the old one has run."""
    x = torch.randn(1, 3, 2, 4)
    config = token(KernelConfig(attention="mine"))
    record = register(Kernel("attention", "mine", serves, load_a))
    assert kernels("attention")["mine"] is record
    look_up = {"dims": {"h": 2, "d": 4}, "length": 3, "grad": False, "config": config}
    assert function_for("attention", x, **look_up) is run_a
    same = register(operation="attention", name="mine", supports=serves, load=load_b)
    assert kernels("attention")["mine"] is same and same != record
    assert function_for("attention", x, **look_up) is run_b
    stand_in("mine", refuses)
    with pytest.raises(KernelUnavailable):
        function_for("attention", x, **look_up)


def test_a_tracer_may_make_symbols_of_the_sizes() -> None:
    """A table cannot hold those: the choice is made again, and is the same."""
    x = torch.randn(2, 5, 3, 4)
    config = token(KernelConfig(attention="torch"))
    traced = make_fx(lambda q: attention(q, q, q, config=config), tracing_mode="symbolic")(x)
    torch.testing.assert_close(traced(x), attention(x, x, x, config=config))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_autocast_is_left_alone_where_it_is_off(device: str) -> None:
    """Turning it off costs more than a look-up; a device that has none must not be asked to."""
    x = torch.empty(2, 3, device=device)
    with without_autocast(x) as context:
        assert context is None and not under_autocast(x)
    if device == "cpu":
        with torch.autocast("cpu"):
            assert under_autocast(x)
            with without_autocast(x):
                assert not under_autocast(x)
            assert under_autocast(x)


def test_the_restored_registry_has_no_stand_ins() -> None:
    """What keeps these tests apart from all others."""
    with restored():
        stand_in("mine")
        stand_in("torch", refuses)
        assert "mine" in kernels("attention")
    assert "mine" not in kernels("attention") and kernels("attention")["torch"].supports is not refuses


def test_an_operation_of_somebody_elses() -> None:
    """It is found, and the words mean what they say: the preset's lists hold its `torch`, then its `reference`."""
    register_operation(Operation("rotary", "turns", ("n",)))
    stand_in("reference", operation="rotary")
    request = Request("rotary", "cuda", torch.float32, Dims({"n": 3}))
    assert decide(request, "auto").rejected[0][0] == "torch"  # it has none, and that is said
    stand_in("torch", operation="rotary")
    assert decide(request, "flash").kernel.name == "torch" and decide(request, "reference").kernel.name == "reference"


def test_unknown_operations_are_named() -> None:
    """With the nearest one."""
    with pytest.raises(KeyError, match="did you mean 'edge_transition'"):
        kernels("edge_transitions")
    with pytest.raises(KeyError, match="no operation 'atention'"):
        decide(Request("atention", "cpu", torch.float32, Dims({"n": 1})))


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution's entry points: one that registers, one that is a module, and three that fail."""
    package = tmp_path / "fake_kernels-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-kernels\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        textwrap.dedent(
            """
            [foldkernels.kernels]
            good = fake_kernels.good:register_all
            module = fake_kernels.module
            raises = fake_kernels.good:fails
            unimportable = fake_kernels.broken
            absent = fake_kernels.nowhere:register_all

            [foldkernels.other]
            other = fake_kernels.good:fails
            """
        )
    )
    folder = tmp_path / "fake_kernels"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    register = """
        from foldkernels.kernels.registry import register
        from foldkernels.kernels.requests import serves_everything
        def run(q, k, v, *rest): return v
        def load(): return run
    """
    good = """
        def register_all():
            register(operation="attention", name="theirs", supports=serves_everything, load=load)
        def fails():
            raise OSError("no licence server")
    """
    module = """
        register(operation="attention", name="theirs_too", supports=serves_everything, load=load)
    """
    (folder / "good.py").write_text(textwrap.dedent(register) + textwrap.dedent(good))
    (folder / "module.py").write_text(textwrap.dedent(register) + textwrap.dedent(module))
    (folder / "broken.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_discovered", False)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "fake_kernels"]:
        del sys.modules[name]


@pytest.mark.usefixtures("plugins")
def test_other_packages_register_through_the_entry_point_group() -> None:
    """A callable is called, a module imported; what raises is kept with its text and takes nothing down."""
    assert {"theirs", "theirs_too", "torch", "reference"} <= set(kernels("attention"))
    assert broken_plugins() == {
        "raises": "OSError: no licence server",
        "unimportable": "ModuleNotFoundError: No module named 'no_such_package'",
        "absent": "ModuleNotFoundError: No module named 'fake_kernels.nowhere'",
    }
    x = torch.randn(1, 3, 2, 4)
    with record_kernels() as ran:
        assert torch.equal(attention(x, x, 2 * x, config=token(KernelConfig(attention="theirs"))), 2 * x)
    assert ran == ["attention: theirs"]


# ------------------------------------------------------------------------------------------------- in a forward pass


def test_length_classes() -> None:
    """Thresholds of all kernels together, in order; a length that reaches one is in the next class."""
    stand_in("one", from_16_on, thresholds=(16,))
    stand_in("two", thresholds=(16, 101))
    assert thresholds("attention") == (16, 101)
    assert [length_class("attention", n) for n in (0, 1, 15, 16, 17, 100, 101, 5000)] == [0, 0, 0, 1, 1, 1, 2, 2]
    # What fuses operations changes its mind wherever one of them does.
    stand_in("three", operation="invariant_point_attention", thresholds=(33,))
    assert 33 in thresholds("edge_transition_attention") and 16 not in thresholds("edge_transition_attention")


def test_the_table_asks_once_per_key() -> None:
    """An unseen device, type, gradient, length class or option is decided; a seen one is looked up."""
    asked: list[Request] = []

    def counts(request: Request) -> list[Reason]:
        asked.append(request)
        return from_16_on(request)

    stand_in("torch", counts, thresholds=(16,))
    config = token(KernelConfig(preset="torch"))

    def run(n: int, dtype: torch.dtype = torch.float32, device: str = "cpu", grad: bool = False) -> None:
        x = torch.zeros(1, n, 2, 4, dtype=dtype, device=device, requires_grad=grad)
        attention(x, x, x, config=config)

    for n in (3, 7, 15):
        run(n)
    assert len(asked) == 1 and asked[0].dims["n"] == 0
    for n in (16, 40, 300):
        run(n)
    assert len(asked) == 2 and asked[1].dims["n"] == 16
    run(3, torch.float64)
    run(3, grad=True)
    run(3, device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        run(3)
    x = torch.zeros(1, 3, 2, 4)
    attention(x, x, x, dropout=0.5, config=config)
    seen = [(r.dtype, r.grad, r.device, r.options) for r in asked[2:]]
    assert seen == [
        (torch.float64, False, "cpu", frozenset()),
        (torch.float32, True, "cpu", frozenset()),
        (torch.float32, False, "meta", frozenset()),
        (torch.bfloat16, False, "cpu", frozenset()),
        (torch.float32, False, "cpu", frozenset({"dropout"})),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        run(5)
    run(9, torch.float64)
    assert len(asked) == 7


def test_record_kernels_nests() -> None:
    """Each lists what ran inside it, in order; the inner one's end does not end the outer one."""
    x = torch.randn(1, 3, 2, 4)
    reference, streamed = (token(KernelConfig(preset=word)) for word in ("reference", "torch"))
    with record_kernels() as outer:
        with record_kernels() as empty:
            pass
        attention(x, x, x, config=reference)
        with record_kernels() as inner:
            attention(x, x, x, config=streamed)
        attention(x, x, x, config=reference)
    attention(x, x, x, config=reference)
    assert empty == [] and inner == ["attention: torch"]
    assert outer == ["attention: reference", "attention: torch", "attention: reference"]
    with pytest.raises(ZeroDivisionError), record_kernels() as broken:
        1 / 0  # noqa: B018
    attention(x, x, x, config=reference)
    assert broken == [] and registry._recorders == []


def test_many_threads_decide_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the kernels are still being found, nobody sees half of them; and all get the same function."""
    found = threading.Event()
    times = []

    def slowly() -> None:
        times.append(1)
        time.sleep(0.2)
        stand_in("late", thresholds=(16,))
        time.sleep(0.1)
        found.set()

    monkeypatch.setattr(registry, "_import_kernels", slowly)
    monkeypatch.setattr(registry, "_discovered", False)
    config = token(KernelConfig(attention="late"))
    barrier = threading.Barrier(12)
    results: list[Any] = []

    def work(n: int) -> None:
        barrier.wait()
        try:
            x = torch.zeros(1, n, 2, 4)
            function = function_for("attention", x, dims={"h": 2, "d": 4}, length=n, grad=False, config=config)
            results.append((function, found.is_set(), thresholds("attention")))
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=work, args=(n + 10,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [(run_a, True, (16,))] * 12 and times == [1]


def test_a_file_that_registers_while_it_is_found_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread finds kernels and waits for a file that another thread is importing, which registers: no deadlock."""
    registering, done = threading.Event(), threading.Event()

    def finder() -> None:
        registering.set()
        assert done.wait(20), "register waits for the thread that waits for it"

    monkeypatch.setattr(registry, "_import_kernels", finder)
    monkeypatch.setattr(registry, "_discovered", False)

    def other() -> None:
        registering.wait(20)
        stand_in("other")
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    assert "other" in kernels("attention")
    thread.join(20)


def test_finding_kernels_may_fail_and_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted first use leaves no half of a registry behind."""
    calls = []

    def once_interrupted() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(registry, "_import_kernels", once_interrupted)
    monkeypatch.setattr(registry, "_discovered", False)
    with pytest.raises(KeyboardInterrupt):
        operations()
    assert operations() and len(calls) == 2


def test_tokens_survive() -> None:
    """The string that modules carry is a string, and gives the configuration back."""
    for config in (KernelConfig(), KernelConfig(preset="flash"), KernelConfig(attention="torch", fallback="error")):
        words = pickle.loads(pickle.dumps(token(config)))
        assert type(words) is str and settings_of(words) == config


# ------------------------------------------------------------------------------------------------- operations that fuse


def parts_ran(config: Any, grad: bool = False) -> set[str]:
    """What the trunk of the small model ran, of the operations that can be fused and the fused one."""
    model, batch = small_model(config), batch_of("small/case_L17.safetensors")
    with record_kernels() as ran, torch.set_grad_enabled(grad):
        model(batch)
    fused = operations()["edge_transition_attention"]
    return {name for name in ran if name.partition(": ")[0] in (fused.name, *fused.fuses)}


@pytest.mark.parametrize("grad", [False, True])
def test_what_is_required_of_the_parts_holds_for_the_whole(grad: bool) -> None:
    """A fused kernel runs where it is the parts' own; a kernel that the user names is never swapped for another."""
    fused, apart = "edge_transition_attention: torch", ("edge_transition", "invariant_point_attention")
    first = "invariant_point_attention"  # the first block's attention stands alone
    assert parts_ran("torch", grad) == {fused, f"{first}: torch"}
    for preset, name in (("torch", "reference"), ("auto", "reference"), ("reference", "torch")):
        ran = parts_ran({"preset": preset, **dict.fromkeys(apart, name)}, grad)
        assert {each.partition(": ")[2] for each in ran} == {name}, (preset, ran)
    mixed = parts_ran({"preset": "torch", "edge_transition": "reference"}, grad)
    assert mixed == {"edge_transition: reference", "invariant_point_attention: torch"}


def test_a_fused_kernel_follows_its_parts_thresholds() -> None:
    """Where a part would run another kernel at that length, the parts run one by one."""
    dims = {"cn": 8, "cz": 8, "cz_out": 8, "h": 2, "c": 4, "p": 2, "pv": 2}
    call = {"dims": dims, "grad": False, "config": token(KernelConfig(preset="torch"))}
    z = torch.zeros(1, 1, 1, 8)
    assert common_kernel("edge_transition_attention", z, length=3, **call)

    stand_in("torch", from_16_on, operation="edge_transition", thresholds=(16,))
    answers = [common_kernel("edge_transition_attention", z, length=n, **call) for n in (3, 15, 16, 40)]
    assert answers == [False, False, True, True]
    stand_in("torch", refuses, operation="edge_transition_attention")
    assert not common_kernel("edge_transition_attention", z, length=40, **call)
    error = {**call, "config": token(KernelConfig(preset="torch", fallback="error"))}
    assert not common_kernel("edge_transition_attention", z, length=40, **error)
