"""`accelerate`: it replaces what it knows for certain, changes nothing else about a model, and can be undone."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foldkernels
from foldkernels.compat.accelerate import Adapter, VerificationFailed, engine, verification
from foldkernels.compat.accelerate.adapters import adapters

from ...support.foreign import multiflow
from ...support.foreign.frames import Rigid, random_rigid

IPA = "invariant_point_attention: torch"


class Model(nn.Module):
    """Two layers that are known, and some that are not."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.first = multiflow.ipa(**changes)
        self.norm = nn.LayerNorm(self.first.c_s)
        self.tfmr = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(self.first.c_s, 2, 32, batch_first=True), 1, enable_nested_tensor=False
        )
        self.second = multiflow.ipa(**changes)

    def forward(self, s: Tensor, z: Tensor, r: Rigid, mask: Tensor) -> Tensor:
        update = self.first(s, z, r, mask)
        update *= mask[..., None]  # in place, as the originals' parents do
        s = self.tfmr(self.norm(s + update))
        out: Tensor = self.second(s, z, r, mask) * mask[..., None]
        return out


def inputs(n: int = 9, batch: int = 2) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, n)
    mask[0, -2:] = 0.0
    s, z = torch.randn(batch, n, 24, generator=generator), torch.randn(batch, n, n, 16, generator=generator)
    return s, z, random_rigid(batch, n), mask


def results(model: nn.Module, *call: Any) -> dict[str, Tensor]:
    """The output, and every gradient of a random direction."""
    model.zero_grad()
    out = model(*call)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return {"out": out.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_alike(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    largest = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        scale = max(float(value.abs().max()), 1e-3 * largest)
        assert float((found[name] - value).abs().max()) <= (1e-5 if name == "out" else 1e-4) * scale, name


def test_the_forwards_are_replaced_and_compute_the_same() -> None:
    model = Model().eval()
    wanted = results(model, *inputs())
    report = foldkernels.accelerate(model)
    assert report.replaced == ("first", "second") and report.left_alone == {}
    with foldkernels.record_kernels() as ran:
        assert_alike(results(model, *inputs()), wanted)
    assert ran == [IPA, IPA]


def test_nothing_else_about_the_model_changes() -> None:
    model = Model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    identities = [id(parameter) for parameter in model.parameters()]
    modules = list(model.named_modules())
    foldkernels.accelerate(model)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert list(model.named_modules()) == modules and list(model.named_buffers()) == []


def test_restore_undoes_everything() -> None:
    model = Model()
    before = [dict(module.__dict__) for module in model.modules()]
    foldkernels.accelerate(model)
    assert foldkernels.restore(model) == 2
    assert [dict(module.__dict__) for module in model.modules()] == before
    with foldkernels.record_kernels() as ran:
        model(*inputs())
    assert ran == [] and foldkernels.restore(model) == 0


def test_twice_is_once() -> None:
    model = Model()
    foldkernels.accelerate(model, "reference")
    forwards = [model.first.forward, model.second.forward]
    report = foldkernels.accelerate(model)
    assert [model.first.forward, model.second.forward] == forwards
    assert [e.status for e in report.entries if e.adapter or "replaced" in e.status] == ["replaced before"] * 2
    with foldkernels.record_kernels() as ran:
        model(*inputs())
    assert set(ran) == {"invariant_point_attention: reference"}


def test_a_bound_model_can_be_bound_again_and_explained() -> None:
    model = Model()
    foldkernels.accelerate(model, "torch")
    assert foldkernels.bind(model, "reference").kernels() == {"invariant_point_attention": ("reference",)}
    assert "invariant_point_attention" in str(foldkernels.explain(model, length=9))
    foldkernels.restore(model)
    assert foldkernels.bind(model).kernels() == {}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_accelerated_with_its_own_weights(copied: Any) -> None:
    model = Model().eval()
    foldkernels.accelerate(model, "reference")
    wanted = model(*inputs())
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with foldkernels.record_kernels() as ran:
        assert torch.equal(other(*inputs()), wanted)
    assert ran == ["invariant_point_attention: reference"] * 2
    assert foldkernels.restore(other) == 2 and foldkernels.restore(model) == 2


def test_a_compiled_model_has_one_graph() -> None:
    model = Model().eval()
    foldkernels.accelerate(model)
    wanted = model.first(*inputs())
    compiled = torch.compile(model.first, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs()), wanted)


def test_hooks_on_a_replaced_module_still_run() -> None:
    model = Model()
    seen: list[str] = []
    model.first.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    foldkernels.accelerate(model)
    model(*inputs())
    assert seen == ["InvariantPointAttention"]


# ------------------------------------------------------------------------------------------------- what is left alone


def forward_hook(layer: multiflow.InvariantPointAttention) -> None:
    layer.linear_b.register_forward_hook(lambda *args: None)


def backward_hook(layer: multiflow.InvariantPointAttention) -> None:
    layer.down_z.register_full_backward_hook(lambda *args: None)


def own_forward(layer: multiflow.InvariantPointAttention) -> None:
    layer.forward = layer.forward  # as fairscale's checkpoint_wrapper leaves it


def parametrized(layer: multiflow.InvariantPointAttention) -> None:
    torch.nn.utils.parametrizations.weight_norm(layer.linear_q)


def another_linear(layer: multiflow.InvariantPointAttention) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    layer.linear_q = Scaled(24, 15)


def more_parameters(layer: multiflow.InvariantPointAttention) -> None:
    layer.gate = nn.Linear(24, 24)


def fewer_parameters(layer: multiflow.InvariantPointAttention) -> None:
    layer.linear_out = nn.Linear(layer.linear_out.in_features, 24, bias=False)


def another_shape(layer: multiflow.InvariantPointAttention) -> None:
    layer.linear_b = nn.Linear(16, 4)


def another_softmax(layer: multiflow.InvariantPointAttention) -> None:
    layer.softmax = nn.Softmin(dim=-1)


def compiled(layer: multiflow.InvariantPointAttention) -> None:
    layer.compile(backend="eager")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (forward_hook, "its linear_b has a hook"),
        (backward_hook, "its down_z has a hook"),
        (own_forward, "it has a forward of its own on the instance"),
        (parametrized, "its linear_q is parametrized"),
        (another_linear, "its linear_q is a Scaled with a forward of its own"),
        (more_parameters, "a parameter it should not have: gate.weight, gate.bias"),
        (fewer_parameters, "no parameter linear_out.bias"),
        (another_shape, "linear_b.weight has shape [4, 16], where its attributes say [3, 16]"),
        (another_softmax, "its softmax is a Softmin"),
        (compiled, "it is compiled already"),
    ],
)
def test_a_changed_module_is_left_alone_and_the_report_says_why(change: Any, reason: str) -> None:
    model = Model()
    change(model.first)
    forward = model.first.__dict__.get("forward")
    report = foldkernels.accelerate(model)
    assert report.replaced == ("second",)
    assert reason in report.left_alone["first"] and reason in str(report)
    assert model.first.__dict__.get("forward") is forward and "kernel_config" not in model.first.__dict__


def test_another_forward_under_the_same_name_is_left_alone() -> None:
    class InvariantPointAttention(multiflow.InvariantPointAttention):
        def forward(self, s, z, r, mask, flag=False):  # type: ignore[no-untyped-def,override]
            return s

    report = foldkernels.accelerate(nn.Sequential(InvariantPointAttention(multiflow.ipa()._ipa_conf)))
    assert report.replaced == ()
    assert "overrides forward of " in report.left_alone["0"]


def test_a_model_with_nothing_to_replace_says_so_and_names_the_nearest() -> None:
    class Mine(multiflow.InvariantPointAttention):
        pass

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            multiflow.ipa_parameters(self, multiflow.ipa()._ipa_conf)

    report = foldkernels.accelerate(nn.Sequential(Mine(multiflow.ipa()._ipa_conf), Other(), nn.Linear(2, 2)))
    assert report.replaced == () and report.bound is None
    assert [miss.class_name for miss in report.misses] == ["Mine", "Other"]
    text = str(report)
    assert "nothing to accelerate" in text
    assert "a subclass of InvariantPointAttention" in text and "has 8 of 8 parameters" in text


def test_pytorchs_own_transformer_needs_nothing() -> None:
    report = foldkernels.accelerate(Model())
    (entry,) = (e for e in report.entries if e.module == "tfmr")
    assert entry.status == "needs nothing" and "tfmr" in str(report)


def test_a_kernel_that_cannot_run_leaves_the_model_as_it_was() -> None:
    model = Model()
    with pytest.raises(foldkernels.KernelUnavailable):
        foldkernels.accelerate(model, {"invariant_point_attention": "nonesuch"})
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match="not dict"):
        foldkernels.accelerate({})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not dict"):
        foldkernels.restore({})  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- the proof


def test_verify_measures_each_module_and_changes_no_weight() -> None:
    model = Model().half()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = foldkernels.accelerate(model, verify=True)
    assert report.replaced == ("first", "second")
    for entry in report.entries:
        if entry.status == "replaced":
            assert entry.proof is not None and entry.proof.passed and 0 < entry.proof.forward < 1e-5
            assert 0 < entry.proof.gradient < 1e-4
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "verified: forward" in str(report) and json.dumps(report.as_dict())


def test_verify_sees_through_output_layers_of_zeros() -> None:
    """A layer that computes something else is found out although its last layer gives zeros."""
    model = Model()
    for layer in (model.first, model.second):
        nn.init.zeros_(layer.linear_out.weight)
    model.first.inf = model.second.inf = 0.0  # the original forward now attends to masked keys; ours does not
    report = foldkernels.accelerate(model, verify=True)
    assert report.replaced == () and set(report.left_alone) == {"first", "second"}
    assert "it differs from its own forward: forward " in report.left_alone["first"]
    assert report.misses == ()
    with pytest.raises(VerificationFailed, match=r"first .* differs from its own forward"):
        foldkernels.accelerate(model, verify=True, strict=True)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_proof_with_nan_does_not_pass() -> None:
    assert not verification.Proof(float("nan"), 0.0, "s", "z").passed
    errors = verification._errors({"a": torch.tensor([float("nan")])}, {"a": torch.tensor([1.0])}, 0.0)
    assert not errors["a"] <= 1.0


# -------------------------------------------------------------------------------------------------------- the adapters


def test_every_adapter_says_what_it_is() -> None:
    found = adapters()
    assert "multiflow_ipa" in found
    operations = set(foldkernels.kernels.registry.operations())
    for adapter in found.values():
        assert isinstance(adapter, Adapter) and adapter.title and adapter.projects and adapter.parameters
        assert adapter.classes and set(adapter.operations) <= operations


def test_an_offloaded_call_runs_the_original_forward() -> None:
    layer = multiflow.ipa()
    s, z, r, mask = inputs()
    wanted = layer(s, None, r, mask, None, True, [z])
    engine.accelerate(layer)
    with foldkernels.record_kernels() as ran:
        assert torch.equal(layer(s, None, r, mask, _offload_inference=True, _z_reference_list=[z]), wanted)
    assert ran == []


def test_training_with_dropout_runs_the_original_forward() -> None:
    layer = multiflow.ipa(dropout=0.3)
    report = engine.accelerate(layer)
    assert any("in training its own forward runs" in note for note in report.entries[0].notes)
    with foldkernels.record_kernels() as ran:
        layer.train()(*inputs())
        layer.eval()(*inputs())
    assert ran == [IPA]


# --------------------------------------------------------------------------------------------------- the real thing


def _patched_forward(self: Any, s: Tensor, z: Tensor, r: Rigid, mask: Tensor) -> Tensor:
    return torch.zeros_like(s)


def test_a_subclass_of_the_same_name_is_another_function() -> None:
    class InvariantPointAttention(multiflow.InvariantPointAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
            return 2 * super().forward(*args, **kwargs)

    InvariantPointAttention.forward.__signature__ = inspect.signature(multiflow.InvariantPointAttention.forward)  # type: ignore[attr-defined]
    layer = multiflow.ipa()
    layer.__class__ = InvariantPointAttention
    assert "overrides forward of " in foldkernels.accelerate(layer).left_alone[""]


def test_a_subclass_that_changes_nothing_is_the_same_function() -> None:
    class InvariantPointAttention(multiflow.InvariantPointAttention):
        def extra_repr(self) -> str:
            return "mine"

    layer = multiflow.ipa()
    layer.__class__ = InvariantPointAttention
    assert foldkernels.accelerate(layer).replaced == ("",)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_class_whose_forward_was_patched_is_another_function(monkeypatch: pytest.MonkeyPatch, wrapped: bool) -> None:
    own = multiflow.InvariantPointAttention.forward
    project: dict[str, Any] = {"__name__": "tests_of_others", "own": own}
    exec("def patch(self, *args): return 2 * own(self, *args)", project)
    patch = functools.wraps(own)(project["patch"]) if wrapped else _patched_forward
    monkeypatch.setattr(multiflow.InvariantPointAttention, "forward", patch)
    reason = foldkernels.accelerate(multiflow.ipa()).left_alone[""]
    assert "it is a InvariantPointAttention, whose forward is tests" in reason and "a patch of the class" in reason


def test_a_childs_class_that_was_patched_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    own = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * own(self, x))
    assert "its linear_q is a Linear, whose forward is tests." in foldkernels.accelerate(multiflow.ipa()).left_alone[""]


@pytest.mark.parametrize("name", ["forward", "linear_q"])
def test_a_class_that_is_patched_later_runs_what_was_put_there(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    theirs = multiflow.ipa()
    ours = copy.deepcopy(theirs)
    foldkernels.accelerate(ours)
    kind = multiflow.InvariantPointAttention if name == "forward" else nn.Linear
    own: Any = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args: 2 * own(self, *args))
    assert torch.equal(ours(*inputs()), theirs(*inputs()))


def test_a_method_of_the_instance_is_seen() -> None:
    layer = multiflow.edge_features()
    layer.embed_relpos = lambda r: torch.zeros(())
    assert "a method embed_relpos of its own on the instance" in foldkernels.accelerate(layer).left_alone[""]


def test_a_weight_of_another_kind_of_tensor_is_seen() -> None:
    class Quantized(Tensor):
        pass

    layer = multiflow.ipa()
    layer.linear_b._parameters["weight"] = layer.linear_b.weight.detach().as_subclass(Quantized)
    assert "the weight of its linear_b is a Quantized" in foldkernels.accelerate(layer, verify=True).left_alone[""]
