"""`explain`: the choices on this machine and on others, which are data."""

import json

import pytest
import torch

import foldkernels
from foldkernels.compat.multiflow import FlowModel
from foldkernels.configs.presets import LEFT_OUT, PRESETS, candidates
from foldkernels.kernels import registry
from foldkernels.kernels.hardware.machine import MACHINES, Machine
from foldkernels.kernels.registry import choice, registration
from foldkernels.kernels.registry.types import Kernel, Reason

pytestmark = pytest.mark.quick

DEVICES = {"h100": "cuda", "a100": "cuda", "rtx4090": "cuda", "mac": "mps", "cpu": "cpu"}
SECTION = {"node_embed_size": 32, "edge_embed_size": 16, "ipa": {"num_blocks": 2, "seq_tfmr_num_layers": 1}}
SECTION |= {"node_features": {}, "edge_features": {}}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FlowModel:
    """Multiflow's model, small, without memory for its weights."""
    monkeypatch.delenv("FOLDKERNELS_KERNEL", raising=False)
    with torch.device("meta"):
        return FlowModel(SECTION)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> str:
    """A kernel of `attention` that needs triton and capability 9.0, has no backward, and leads the flash preset."""

    def supports(request):
        if request.device != "cuda":
            return [Reason("it runs on NVIDIA GPUs only")]
        reasons = [] if (request.capability or (0, 0)) >= (9, 0) else [Reason("it needs compute capability 9.0")]
        return reasons + ([Reason("it starts at 100 tokens")] if request.dims["n"] < 100 else [])

    kernel = Kernel("attention", "fused", supports, lambda: print, needs=("triton",), backward=False, thresholds=(100,))
    monkeypatch.setitem(registration._kernels, "attention", {**registry.kernels("attention"), "fused": kernel})
    monkeypatch.setattr(registration, "_thresholds", {})
    normal = choice.candidates

    def candidates(preset, operation, device):
        names = normal(preset, operation, device)
        return ("fused", *names) if (preset, operation, device) == ("flash", "attention", "cuda") else names

    monkeypatch.setattr(choice, "candidates", candidates)
    return "fused"


#: What Multiflow's model uses; the other operations belong to blocks that it can be given.
OPERATIONS = ("edge_features", "invariant_point_attention", "attention", "edge_transition")


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("machine", list(DEVICES))
def test_every_machine_has_a_choice_for_every_operation(model, machine, preset):
    explanation = foldkernels.explain(model, preset, machine=machine, length=256)
    assert explanation.runs
    assert explanation.place.device == DEVICES[machine]
    assert explanation.place.capability == MACHINES[machine].capability
    assert set(explanation.kernels()) == set(OPERATIONS)
    for chosen in explanation.choices:
        # The first choice, or the first after those against which something speaks.
        names, decision = PRESETS[preset][chosen.request.operation][DEVICES[machine]], chosen.decision
        assert decision is not None
        rejected = tuple(name for name, reasons in decision.rejected if reasons)
        assert (*rejected, decision.kernel.name) == names[: len(rejected) + 1]
    assert MACHINES[machine].name in str(explanation)
    assert {chosen.request.grad for chosen in explanation.choices} == {False, True}


def test_a_machine_that_can_runs_the_better_kernel(model, fused):
    on_h100 = foldkernels.explain(model, "flash", machine="h100", length=256)
    chosen = {choice.request.grad: choice.decision.kernel.name for choice in _attention(on_h100)}
    assert chosen == {False: "fused", True: "torch"}
    assert "attention: not fused: it has no backward pass" in str(on_h100)

    on_a100 = foldkernels.explain(model, "flash", machine="a100", length=256, grad=False)
    assert on_a100.kernels()["attention"] == ("torch",)
    assert "attention: not fused: it needs compute capability 9.0" in str(on_a100)

    # On a Mac, the same word is a list of its own that does not know the kernel: nothing to report.
    on_mac = foldkernels.explain(model, "flash", machine="mac", length=256)
    assert on_mac.kernels()["attention"] == ("torch",)
    assert "fused" not in str(on_mac)
    assert "first choice" in str(on_mac)


def test_what_auto_leaves_out_is_told_with_the_way_to_it(model):
    """Our Triton kernels have not run on a GPU: on one, `auto` says so, with the commands; elsewhere nothing is."""
    text = str(foldkernels.explain(model, "auto", machine="h100", length=256))
    for operation in ("invariant_point_attention", "edge_transition"):
        assert f"{operation}: not triton: auto leaves it out: it was interpreted" in text
        assert f"foldkernels verify -o {operation} --kernel-name triton" in text
        assert f"kernel: {{{operation}: triton}}, or kernel: flash" in text
    assert "edge_transition: not triton: in float32, a tile's hidden layer" in text, "what else is against it"
    assert "first choice" not in text
    found = foldkernels.explain(model, "auto", machine="h100", length=256).as_dict()["left_out"]
    assert {x["operation"] for x in found} == {"invariant_point_attention", "edge_transition"}
    required = {"invariant_point_attention": "torch", "edge_transition": "torch"}
    for kernel, machine in (("flash", "h100"), ("torch", "h100"), (required, "h100"), ("auto", "mac"), ("auto", "cpu")):
        assert "leaves it out" not in str(foldkernels.explain(model, kernel, machine=machine, length=256))
    every = {(word, name, kernel) for word, table in LEFT_OUT.items() for name, by in table.items()
             for device, kernel in by.items() if kernel in candidates(word, name, device)}  # fmt: skip
    assert not every, "what a preset tries is not left out"


def test_packages_of_the_machine_decide(model, fused):
    bare = Machine("an H100 without triton", "cuda", (9, 0), packages={"torch": "2.13.0"})
    text = str(foldkernels.explain(model, "flash", machine=bare, length=256, grad=False))
    assert "attention: not fused: triton: not installed on an H100 without triton" in text
    assert "fix: pip install triton" in text


def test_lengths(model, fused):
    short = foldkernels.explain(model, "flash", machine="h100", length=50, grad=False)
    assert short.kernels()["attention"] == ("torch",)
    assert "it starts at 100 tokens" in str(short)
    every = foldkernels.explain(model, "flash", machine="h100", grad=False)
    assert set(every.kernels()["attention"]) == {"torch", "fused"}
    assert "any length" in str(every)


def test_what_nothing_can_serve_is_told_and_not_raised(model, fused):
    explanation = foldkernels.explain(model, {"attention": "fused"}, machine="mac", length=256)
    assert not explanation.runs
    assert explanation.kernels()["attention"] == ()
    text = str(explanation)
    assert "No kernel can run this." in text and "it runs on NVIDIA GPUs only" in text
    assert "none can" in text
    refused = [choice for choice in explanation.as_dict()["choices"] if choice["refused"]]
    assert refused and all(choice["kernel"] is None for choice in refused)
    # Only training cannot: the model runs, and the text still says so.
    explanation = foldkernels.explain(model, {"attention": "fused"}, machine="h100", length=256)
    assert explanation.runs and "it has no backward pass" in str(explanation)


def test_a_bound_model_is_explained_as_it_was_bound(monkeypatch):
    model = FlowModel(SECTION)
    model.kernels = foldkernels.bind(model, "reference", command_line=("attention=torch",))
    monkeypatch.setenv("FOLDKERNELS_KERNEL", "torch")  # came too late
    explanation = foldkernels.explain(model)
    assert explanation.kernels() == {**dict.fromkeys(OPERATIONS, ("reference",)), "attention": ("torch",)}
    assert explanation.configurations == (model.kernels.resolved,)
    assert "preset=reference (call)" in str(explanation) and "attention=torch (command line)" in str(explanation)
    # Without the report the values are known, but not where they came from.
    model.kernels = None
    assert "preset=reference (bind)" in str(foldkernels.explain(model))
    # A question of its own is answered, and changes nothing.
    assert foldkernels.explain(model, "torch").kernels()["edge_transition"] == ("torch",)
    assert foldkernels.explain(model).kernels()["edge_transition"] == ("reference",)


def test_modules_that_were_bound_apart(monkeypatch):
    monkeypatch.delenv("FOLDKERNELS_KERNEL", raising=False)
    model = FlowModel(SECTION)
    foldkernels.bind(model, "torch")
    foldkernels.bind(model.edge_feature_net, "reference")
    explanation = foldkernels.explain(model)
    assert explanation.kernels()["edge_features"] == ("reference",)
    assert explanation.kernels()["attention"] == ("torch",)
    assert len(explanation.configurations) == 2


def test_the_environment_speaks_for_a_model_that_nobody_bound(model, monkeypatch):
    monkeypatch.setenv("FOLDKERNELS_KERNEL", "reference")
    explanation = foldkernels.explain(model, machine="cpu")
    assert explanation.kernels() == dict.fromkeys(OPERATIONS, ("reference",))
    assert "environment FOLDKERNELS_KERNEL" in str(explanation)


def test_what_explain_says_is_what_runs():
    """On this machine: the record of a forward pass holds the kernels that were announced, and no others."""
    from foldkernels.modules.invariant_point_attention import InvariantPointAttention
    from foldkernels.modules.rigid import Rigid

    layer = InvariantPointAttention(c_s=8, c_z=8, c_hidden=4, no_heads=2, no_qk_points=2, no_v_points=2)
    for word in ("reference", "torch"):
        foldkernels.bind(layer, word)
        frames = Rigid(torch.eye(3).expand(1, 5, 3, 3), torch.zeros(1, 5, 3))
        with torch.no_grad(), foldkernels.record_kernels() as ran:
            layer(torch.randn(1, 5, 8), torch.randn(1, 5, 5, 8), frames, torch.ones(1, 5))
        announced = foldkernels.explain(layer, length=5, grad=False).kernels()
        assert ran == [f"{operation}: {name}" for operation, names in announced.items() for name in names]


def test_what_is_fused_is_told(model):
    on_cpu = foldkernels.explain(model, "torch", machine="cpu", length=64)
    assert {choice.request.operation for choice in on_cpu.fused} == {"edge_transition_attention"}
    assert "edge_transition + invariant_point_attention, where they meet: one pass" in str(on_cpu)
    apart = foldkernels.explain(model, {"preset": "torch", "edge_transition": "reference"}, machine="cpu", length=64)
    assert apart.fused == ()


def test_as_dict_is_json(model, fused):
    explanation = foldkernels.explain(model, "flash", machine="h100", length=256)
    found = json.loads(json.dumps(explanation.as_dict()))
    assert found["capability"] == [9, 0] and found["dtype"] == "float32"
    assert found["kernels"]["attention"] == ["fused", "torch"]
    rejected = [each for choice in found["choices"] for each in choice["rejected"]]
    assert {"kernel": "fused", "why": "it has no backward pass"}.items() <= rejected[0].items()


def test_a_model_without_kernels():
    explanation = foldkernels.explain(torch.nn.Linear(2, 2), machine="cpu")
    assert explanation.runs and explanation.choices == ()
    assert "No module of this model calls a kernel." in str(explanation)


def test_an_unknown_machine(model):
    with pytest.raises(ValueError, match="did you mean 'h100'"):
        foldkernels.explain(model, machine="h10")


def _attention(explanation):
    return [
        choice
        for choice in explanation.choices
        if choice.request.operation == "attention" and not choice.request.options
    ]
