"""`bind`: it decides before the forward, says what it decided once, and changes nothing else about a model."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foldkernels.configs.kernel import KernelConfig
from foldkernels.configs.presets import PRESETS
from foldkernels.configs.resolve import ENVIRONMENT_VARIABLE, ConfigError
from foldkernels.kernels import registry
from foldkernels.kernels.registry import (
    KernelFallbackWarning,
    KernelUnavailable,
    record_kernels,
    settings_of,
)
from foldkernels.kernels.registry.binding import Use, bind
from foldkernels.kernels.registry.types import Reason, Request
from foldkernels.modules.kernel_module import KernelModule
from foldkernels.modules.sequence_transformer import SelfAttention

from ..support.goldens import TOLERANCE, batch_of, small_model
from ..support.standins import from_16_on, load_b, refuses, restored, serves, stand_in

CASE = "small/case_L17.safetensors"


@pytest.fixture(autouse=True)
def registry_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test may register what it likes; and the environment says nothing."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    with restored():
        yield


def layer(dropout: float = 0.0) -> SelfAttention:
    """A module that calls one operation."""
    torch.manual_seed(0)
    return SelfAttention(8, 2, dropout)


def call(module: nn.Module, n: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    device = next(module.parameters()).device
    x = torch.linspace(-1, 1, 8 * n, dtype=dtype).view(1, n, 8)
    out: Tensor = module(x.to(device), torch.ones(1, n, dtype=torch.bool, device=device))
    return out


def ran_by(run: Callable[[], Any]) -> list[str]:
    """The kernels' names, of all operations."""
    with record_kernels() as ran:
        run()
    return [name.partition(": ")[2] for name in ran]


# ----------------------------------------------------------------------------------------------- what bind leaves alone


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_binding_changes_no_parameter(preset: str) -> None:
    """The `state_dict` has the same keys, in order, and the same bits; nothing new is a parameter or a buffer."""
    model = small_model("reference")
    keys, bits = list(model.state_dict()), {name: value.clone() for name, value in model.state_dict().items()}
    identities = [id(parameter) for parameter in model.parameters()]
    bind(model, preset)
    assert list(model.state_dict()) == keys and list(dict(model.named_buffers())) == []
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert all(settings_of(module.kernel_config).preset == preset for module in users(model))


def users(model: nn.Module) -> list[KernelModule]:
    found = [module for module in model.modules() if isinstance(module, KernelModule)]
    assert found
    return found


def test_binding_again_replaces() -> None:
    """The last word holds, for each module; a part may be bound alone."""
    model, batch = small_model("torch"), batch_of(CASE)
    with torch.no_grad():
        assert set(ran_by(lambda: model(batch))) == {"torch"}
        bind(model, "reference")
        assert set(ran_by(lambda: model(batch))) == {"reference"}
        bind(model, "torch")
        bind(model.trunk["seq_tfmr_1"], "reference")
        with record_kernels() as ran:
            model(batch)
    assert [name for name in ran if name.startswith("attention:")] == [
        f"attention: {name}" for name in ("torch", "torch", "reference", "reference", "torch", "torch")
    ]
    assert {name.partition(": ")[2] for name in ran if not name.startswith("attention:")} == {"torch"}


def test_binding_twice_is_binding_once() -> None:
    """The same report, the same tokens, the same output."""
    model = layer()
    first = bind(model, "flash")
    out = call(model)
    assert bind(model, "flash") == first and torch.equal(call(model), out)


def test_a_module_that_nobody_bound_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each call, so that a later change counts; a bound one does not look at it any more."""
    model = layer()
    assert model.kernel_config == "" and "kernel_config" not in model.state_dict()
    for word in ("reference", "torch"):
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, word)
        assert ran_by(lambda: call(model)) == [word]
    bind(model)
    assert settings_of(model.kernel_config).preset == "torch"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert ran_by(lambda: call(model)) == ["torch"]
    bind(other := layer(), {})
    assert ran_by(lambda: call(other)) == ["reference"]


def test_a_model_that_calls_no_kernel() -> None:
    """Nothing to do, and that is no error."""
    report = bind(nn.Linear(3, 3), "flash")
    assert report.kernels() == {} and report.modules == () and len(str(report).splitlines()) == 1


# ----------------------------------------------------------------------------------------------- after bind, elsewhere


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("n", [5, 15, 16, 40])
def test_a_threshold_is_followed_at_every_length(n: int, autocast: bool, training: bool) -> None:
    """A kernel that serves 16 residues or more runs from there on, whatever the mode; below, the next one."""
    stand_in("torch", from_16_on, thresholds=(16,))
    model = layer(dropout=0.5).train(training)
    report = bind(model, {"preset": "torch", "fallback": "silent"})
    assert report.kernels() == {"attention": ("reference", "torch")}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert ran_by(lambda: call(model, n)) == ["torch" if n >= 16 else "reference"]
        with torch.no_grad():
            assert ran_by(lambda: call(model, n)) == ["torch" if n >= 16 else "reference"]


@pytest.mark.parametrize("kernel", ["reference", "torch"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_bound_on_the_cpu_and_run_on_meta(autocast: bool, training: bool, kernel: str) -> None:
    """The device is looked at when called, not when bound: a whole model gives shapes where there are no numbers."""
    model = small_model({"preset": kernel, "fallback": "silent"}).train(training).to("meta")
    batch = {name: value.to("meta") for name, value in batch_of(CASE).items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), record_kernels() as ran:
        out = model(batch)
        with torch.no_grad():
            model(batch)
    assert {name.partition(": ")[2] for name in ran} == {kernel}
    assert {name: (value.device.type, tuple(value.shape)) for name, value in out.items()} == {
        "pred_trans": ("meta", (2, 17, 3)),
        "pred_rotmats": ("meta", (2, 17, 3, 3)),
        "pred_logits": ("meta", (2, 17, 21)),
        "pred_aatypes": ("meta", (2, 17)),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_moved_to_another_type_after_bind(dtype: torch.dtype) -> None:
    """What was decided for float32 is not used for another type: it is decided again, for that one."""

    def only_float32(request: Request) -> list[Reason]:
        return [] if request.dtype is torch.float32 else [Reason("it knows float32 only")]

    stand_in("torch", only_float32)
    model = layer()
    bind(model, {"preset": "torch", "fallback": "silent"})
    assert ran_by(lambda: call(model)) == ["torch"]
    model.to(dtype)
    assert ran_by(lambda: call(model, dtype=dtype)) == ["reference"] and call(model, dtype=dtype).dtype is dtype
    model.float()
    assert ran_by(lambda: call(model)) == ["torch"]
    with torch.autocast("cpu", torch.bfloat16):
        assert ran_by(lambda: call(model)) == ["reference"]


def test_a_whole_model_in_another_type() -> None:
    """float64 after bind: the same numbers, more of their digits."""
    model, batch = small_model("torch"), batch_of(CASE)
    with torch.no_grad():
        before = model(batch)
        after = model.double()(batch)
    there = batch["res_mask"] > 0.5
    for name, tolerance in TOLERANCE.items():
        assert after[name].dtype is torch.float64
        assert 0 < float((after[name] - before[name])[there].abs().max()) <= tolerance


# --------------------------------------------------------------------------------------------------- copies, processes


@pytest.mark.parametrize("copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_bound_models_can_be_copied_and_pickled(copy: Callable[[nn.Module], nn.Module]) -> None:
    """With their configuration, their report and the checkpoint's config; independent of the original."""
    model, batch = small_model("reference"), batch_of(CASE)
    other: Any = copy(model)
    assert other.kernels == model.kernels and str(other.kernels) == str(model.kernels) and other.config == model.config
    bind(model, "torch")
    with torch.no_grad():
        with record_kernels() as ran:
            out = other(batch)
        assert {name.partition(": ")[2] for name in ran} == {"reference"}
        bind(model, "reference")
        expected = model(batch)
    assert all(torch.equal(out[name], expected[name]) for name in expected)


RUN_PICKLED = """
import pickle, sys, torch
torch.set_num_threads(1)
sys.modules["triton"] = None
model, batch, expected = pickle.load(sys.stdin.buffer)
from foldkernels.kernels.registry import record_kernels
with torch.no_grad(), record_kernels() as ran:
    out = model(batch)
assert {name.partition(": ")[2] for name in ran} == {"torch"}, ran
assert all(torch.equal(out[name], expected[name]) for name in expected)
"""


def test_a_pickled_model_runs_in_a_new_process() -> None:
    """One that has imported nothing of ours: unpickling brings what it needs."""
    model, batch = small_model("torch"), batch_of(CASE)
    with torch.no_grad():
        expected = model(batch)
    done = subprocess.run(
        [sys.executable, "-c", RUN_PICKLED],
        input=pickle.dumps((model, batch, expected)),
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()


def run_in_child(model: nn.Module, connection: Any) -> None:
    torch.set_num_threads(1)
    with torch.no_grad(), record_kernels() as ran:
        connection.send((ran, call(model, 7).numpy()))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork")
def test_a_forked_child_can_decide() -> None:
    """What the parent bound, and had not yet decided, a DataLoader's worker decides for itself."""
    stand_in("mine", thresholds=(6,))
    model = layer()
    bind(model, {"attention": "mine"})
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process with threads, from Python 3.12 on
        child = context.Process(target=run_in_child, args=(model, sending))
        child.start()
    assert receiving.poll(60), "the child hangs"
    ran, out = receiving.recv()
    child.join(60)
    assert child.exitcode == 0 and ran == ["attention: mine"]
    assert torch.equal(torch.from_numpy(out), call(model, 7).detach())


# -------------------------------------------------------------------------------------------------- what bind refuses


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"attention": "never"}, KernelUnavailable, "required by attention: never"),
        ({"attention": "troch"}, KernelUnavailable, "did you mean 'torch'"),
        ({"preset": "torch", "fallback": "error"}, KernelUnavailable, "fallback: error"),
        ("fash", ConfigError, "did you mean 'flash'"),
        ({"preset": "torch", "atention": "torch"}, ConfigError, "no key 'atention'"),
    ],
)
def test_what_cannot_run_raises_at_bind_and_leaves_the_model_alone(
    config: Any, error: type[Exception], words: str
) -> None:
    """Not one module of the model has changed, not even those before the one that cannot be served."""
    stand_in("never", refuses)
    if error is KernelUnavailable and "preset" in config:
        stand_in("torch", refuses)
    model = small_model("reference")
    before = [module.kernel_config for module in users(model)]
    report = model.kernels
    with pytest.raises(error, match=words):
        bind(model, config)
    assert [module.kernel_config for module in users(model)] == before and model.kernels is report
    with torch.no_grad():
        assert set(ran_by(lambda: model(batch_of(CASE)))) == {"reference"}


def test_a_kernel_for_inference_only_binds_and_training_raises() -> None:
    """What is refused is in the report; the forward that asks for it raises, with the same sentence."""
    stand_in("quick", backward=False)
    model = layer()
    report = bind(model, {"attention": "quick"})
    assert report.kernels() == {"attention": ("quick",)}
    ((request, why),) = report.refused
    assert request.endswith("with gradients") and "it has no backward pass" in why
    assert f"cannot run: {request}" in str(report)
    with torch.no_grad():
        assert ran_by(lambda: call(model)) == ["quick"]
    with pytest.raises(KernelUnavailable, match="it has no backward pass"):
        call(model)


# ------------------------------------------------------------------------------------------------------------ warnings


def test_one_warning_at_bind_and_none_in_the_forward() -> None:
    """For a model with many modules: one, that says which, why, and what runs instead, at the caller's line."""
    stand_in("torch", refuses)
    stand_in("torch", refuses, operation="edge_transition")
    model, batch = small_model("reference"), batch_of(CASE)
    with pytest.warns(KernelFallbackWarning) as caught:
        bind(model, "torch")
    (warning,) = caught
    text = str(warning.message)
    assert text.splitlines() == [
        "preset 'torch' falls back:",
        "  attention: reference, not torch: it never runs (fix: wait)",
        "  attention: reference, not torch: and the moon is full",
        "  edge_transition: reference, not torch: it never runs (fix: wait)",
        "  edge_transition: reference, not torch: and the moon is full",
    ]
    assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for training in (False, True):
            with record_kernels() as ran:
                model.train(training)(batch)
            with torch.autocast("cpu", torch.bfloat16):
                model(batch)
            assert {"attention: reference", "edge_transition: reference", "edge_features: torch"} <= set(ran)


@pytest.mark.parametrize(
    "config", ["auto", {"preset": "torch", "fallback": "silent"}, {"preset": "reference", "fallback": "warn"}]
)
def test_no_warning_where_none_is_asked_for(config: Any) -> None:
    """`auto` and `silent` leave it to the report, which tells; `reference` is its own first choice."""
    stand_in("torch", refuses)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = bind(layer(), config)
    first_choice = report.resolved.config.preset == "reference"
    assert ("not torch: it never runs (fix: wait)" in str(report)) is not first_choice


def test_the_presets_bind_without_a_word_here() -> None:
    """On this machine nothing falls back: every preset is its device's own first choice."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for preset in PRESETS:
            report = small_model({"preset": preset, "fallback": "error"}).kernels
            assert report is not None and not any(decision.fell_back for decision in report.decisions())


# ----------------------------------------------------------------------------------------------------------- the report


def test_the_report_tells_what_runs_and_why() -> None:
    """Printed, as data for JSON, and as a mapping."""
    stand_in("torch", from_16_on, thresholds=(16,))
    model = nn.ModuleDict({"a": layer(), "b": layer()})
    report = bind(model, {"preset": "torch", "fallback": "silent"}, file={"precision": "tf32"})
    assert str(report).splitlines() == [
        "kernel: preset=torch (call), fallback=silent (call), precision=tf32 (file), deterministic=False (default)",
        "  attention: reference or torch (in 2 modules)",
        "    not torch: it serves 16 residues or more (fix: use more residues)",
    ]
    assert report.kernels() == {"attention": ("reference", "torch")}
    data = report.as_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["config"] == {"preset": "torch", "fallback": "silent", "precision": "tf32", "deterministic": False}
    assert data["sources"]["precision"] == "file" and data["sources"]["preset"] == "call"
    assert data["modules"] == {"a": ["attention: reference", "attention: torch"]} | {
        "b": ["attention: reference", "attention: torch"]
    }
    assert data["refused"] == []
    assert len(data["decisions"]) == 4  # two length classes, inference and training; the two modules ask the same
    assert data["decisions"][0] == {
        "operation": "attention",
        "request": "attention on cpu, float32, n=0 h=2 d=4, precision tf32",
        "kernel": "reference",
        "source": "preset torch",
        "rejected": [
            {"kernel": "torch", "why": "it serves 16 residues or more", "fix": "use more residues"},
        ],
    }
    assert data["decisions"][2]["kernel"] == "torch" and data["decisions"][2]["rejected"] == []


def test_the_report_of_a_whole_model() -> None:
    """Every operation of Multiflow, in the modules that use it."""
    report = small_model("torch").kernels
    assert report is not None
    assert report.kernels() == dict.fromkeys(
        ("edge_features", "invariant_point_attention", "attention", "edge_transition"), ("torch",)
    )
    assert "  invariant_point_attention: torch (in 3 modules)" in str(report).splitlines()
    assert "  edge_features: torch (in 1 module)" in str(report).splitlines()
    with torch.no_grad(), record_kernels() as ran:
        small_model("torch")(batch_of(CASE))
    known = registry.operations()
    ran_operations = {name.partition(": ")[0] for name in ran}
    assert ran_operations.union(*(known[name].fuses for name in ran_operations)) >= set(report.kernels())


def test_what_the_report_promises_is_what_runs() -> None:
    """For lengths in every class, gradients or not, with dropout: the decision in the report is the kernel that ran."""
    stand_in("torch", from_16_on, thresholds=(16,))
    stand_in("other", load=load_b, thresholds=(33,))
    model = layer(dropout=0.25)
    report = bind(model, {"preset": "torch", "fallback": "silent"})
    promised = {(d.request.dims["n"], d.request.grad, d.request.options): d.kernel.name for d in report.decisions()}
    assert len(promised) == 3 * 2 * 2
    for (n, grad, options), name in promised.items():
        model.train("dropout" in options)
        with torch.set_grad_enabled(grad):
            assert ran_by(lambda n=n: call(model, n + 1)) == [name]


def test_logit_dropout_is_reported_for_training_alone() -> None:
    """IPA with dropped logits: what inference runs stands in the report beside what training runs."""
    model = small_model({"preset": "torch", "fallback": "silent"}, model__ipa__dropout=0.1)
    assert model.kernels is not None
    assert model.kernels.kernels()["invariant_point_attention"] == ("torch", "reference")
    assert "not torch: it cannot drop logits" in str(model.kernels)


class Somebodys(nn.Module):
    """A module that is none of ours, and has what `bind` asks for."""

    kernel_config = ""

    def kernel_uses(self) -> list[Use]:
        return [Use("attention", {"h": 1, "d": 4})]


def test_any_module_with_the_two_names_is_bound() -> None:
    """No base class is needed."""
    stand_in("mine", serves)
    model = nn.Sequential(nn.Linear(2, 2), Somebodys())
    report = bind(model, {"attention": "mine"})
    assert report.kernels() == {"attention": ("mine",)}
    assert settings_of(model[1].kernel_config) == KernelConfig(attention="mine")


def test_a_fresh_interpreter_decides_at_bind_and_loads_at_the_first_call() -> None:
    """In a new process: nothing is looked for before `bind`, and only what runs is loaded."""
    code = """
import warnings; warnings.simplefilter("error")
import torch
from foldkernels import bind, record_kernels
from foldkernels.modules.sequence_transformer import SelfAttention
from foldkernels.kernels.registry import dispatch, registration
assert not registration._discovered
layer = SelfAttention(8, 2, 0.0)
report = bind(layer, "flash")
assert registration._discovered and report.kernels() == {"attention": ("torch",)}
assert not vars(dispatch._loaded), "bind decides; it loads nothing"
with record_kernels() as ran:
    layer(torch.zeros(1, 3, 8), torch.ones(1, 3, dtype=torch.bool))
assert ran == ["attention: torch"] and list(vars(dispatch._loaded)) == ran
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
