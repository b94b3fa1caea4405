"""The adapters of OpenFold, Boltz and ESM: each form is recognised, computes the same, and honours its arguments."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foldkernels
from foldkernels.compat.accelerate import recognise, recognition, verification
from foldkernels.compat.accelerate.adapters import adapters
from foldkernels.compat.accelerate.replacement import Candidate
from foldkernels.modules.pairformer import PairformerLayer

from ...support.foreign import boltz, esm, openfold
from ...support.foreign.frames import random_rigid

pytestmark = pytest.mark.quick

N = 9


class _Genie(openfold._TriangleAttention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return openfold.triangle_attended(self, x, mask)


class _Vendored(openfold._TriangleMultiplication):
    def forward(self, z: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self._update(z, mask)


class _VendoredIncoming(_Vendored):
    """As Multiflow's and FrameFlow's OpenFold has it: `_outgoing` is True, and the class has a product of its own."""

    def __init__(self) -> None:
        super().__init__(outgoing=True)

    def _update(self, z: Tensor, mask: Tensor | None) -> Tensor:
        self._outgoing = False
        try:
            return super()._update(z, mask)
        finally:
            self._outgoing = True


def _own_product(module: nn.Module) -> nn.Module:
    type(module)._combine_projections = None  # type: ignore[attr-defined]
    return module


def _as(name: str, module: nn.Module) -> nn.Module:
    module.__class__ = type(name, (type(module),), {"forward": type(module).forward})
    return module


#: A form: how to make it, the adapter's file, what the report calls it.
FORMS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "OpenFold IPA": (openfold.InvariantPointAttention, "openfold_ipa", "OpenFold 2"),
    "OpenFold multimer IPA": (openfold.InvariantPointAttentionMultimer, "openfold_ipa", "OpenFold, multimer"),
    "OpenFold IPA, is_multimer": (
        lambda: openfold.InvariantPointAttention(is_multimer=True),
        "openfold_ipa",
        "OpenFold, multimer",
    ),
    "ESMFold IPA": (openfold.EsmFoldInvariantPointAttention, "openfold_ipa", "RhoFold, ESMFold"),
    "OpenFold triangle attention": (openfold.TriangleAttention, "triangle_attention", "OpenFold 2"),
    "OpenFold triangle attention, ending": (
        lambda: openfold.TriangleAttention(starting=False),
        "triangle_attention",
        "OpenFold 2",
    ),
    "ESMFold triangle attention": (openfold.EsmFoldTriangleAttention, "triangle_attention", "OpenFold 1"),
    "Genie triangle attention": (lambda: _as("TriangleAttention", _Genie()), "triangle_attention", "Genie 2"),
    "Boltz triangle attention": (boltz.TriangleAttention, "triangle_attention", "Boltz"),
    "Boltz triangle attention, ending": (boltz.TriangleAttentionEndingNode, "triangle_attention", "Boltz"),
    "OpenFold multiplication, outgoing": (
        openfold.TriangleMultiplicationOutgoing,
        "openfold_triangle_multiplication",
        "OpenFold",
    ),
    "OpenFold multiplication, incoming": (
        openfold.TriangleMultiplicationIncoming,
        "openfold_triangle_multiplication",
        "OpenFold",
    ),
    "OpenFold fused multiplication, outgoing": (
        openfold.FusedTriangleMultiplicationOutgoing,
        "openfold_triangle_multiplication",
        "OpenFold, fused projections",
    ),
    "OpenFold fused multiplication, incoming": (
        openfold.FusedTriangleMultiplicationIncoming,
        "openfold_triangle_multiplication",
        "OpenFold, fused projections",
    ),
    "vendored multiplication": (
        lambda: _as("TriangleMultiplicationOutgoing", _Vendored(outgoing=True)),
        "openfold_triangle_multiplication",
        "OpenFold as vendored",
    ),
    "vendored multiplication, incoming": (
        lambda: _own_product(_as("TriangleMultiplicationIncoming", _VendoredIncoming())),
        "openfold_triangle_multiplication",
        "OpenFold as vendored",
    ),
    "Boltz multiplication, outgoing": (boltz.TriangleMultiplicationOutgoing, "boltz_triangle_multiplication", "Boltz"),
    "Boltz multiplication, incoming": (boltz.TriangleMultiplicationIncoming, "boltz_triangle_multiplication", "Boltz"),
    "Boltz-1 pair bias": (boltz.boltz_1, "boltz_attention_pair_bias", "Boltz-1"),
    "Boltz-1 pair bias without norm": (
        lambda: boltz.boltz_1(initial_norm=False),
        "boltz_attention_pair_bias",
        "Boltz-1",
    ),
    "Boltz-2 pair bias": (boltz.boltz_2, "boltz_attention_pair_bias", "Boltz-2"),
    "Boltz-2 given a bias": (
        lambda: boltz.boltz_2(compute_pair_bias=False),
        "boltz_attention_pair_bias",
        "Boltz-2, given a bias",
    ),
    "Boltz transition": (boltz.Transition, "boltz_transition", "Boltz"),
    "OpenFold pair transition": (openfold.PairTransition, "openfold_pair_transition", "OpenFold"),
    "fair-esm attention": (esm.MultiheadAttention, "fair_esm_attention", "fair-esm"),
    "transformers' ESM attention": (esm.EsmSelfAttention, "hugging_face_esm_attention", "transformers"),
}


def pair_inputs(c: int = 12, lead: tuple[int, ...] = (2,)) -> tuple[Tensor, Tensor]:
    """A pair tensor and its mask, two residues masked."""
    residues = torch.ones(N)
    residues[-2:] = 0.0
    generator = torch.Generator().manual_seed(3)
    mask = (residues[:, None] * residues[None, :]).expand(*lead, N, N).clone()
    return torch.randn(*lead, N, N, c, generator=generator), mask


def single_inputs(c: int = 15) -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, N)
    mask[0, -2:] = 0.0
    return torch.randn(2, N, c, generator=torch.Generator().manual_seed(4)), mask


def assert_near(found: Tensor, wanted: Tensor, mask: Tensor | None = None, limit: float = 1e-5) -> None:
    """Equal to `limit` of the largest value, where the mask says that it matters."""
    found, wanted = found.detach(), wanted.detach()
    if mask is not None:
        keep = mask > 0.5
        found, wanted = found[keep], wanted[keep]
    assert float((found - wanted).abs().max()) <= limit * float(wanted.abs().max())


def twins(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A module with weights that are nowhere zero, and an accelerated copy."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    ours = copy.deepcopy(module)
    report = foldkernels.accelerate(ours)
    assert report.replaced, report
    return module, ours


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_recognised_and_proved(form: str) -> None:
    make, adapter, called = FORMS[form]
    torch.manual_seed(0)
    model = nn.Sequential(make())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = foldkernels.accelerate(model, verify=True)
    (entry,) = report.entries
    assert (entry.status, entry.adapter, entry.form) == ("replaced", adapter, called), str(report)
    assert entry.proof is not None and entry.proof.passed
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    forward = model[0].forward
    assert pickle.loads(pickle.dumps(forward.function)) is forward.function  # found by its name
    assert foldkernels.restore(model) == 1 and "forward" not in model[0].__dict__


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_each_form_compiles_to_one_graph(form: str) -> None:
    make, adapter, _ = FORMS[form]
    module = make().eval()
    foldkernels.accelerate(module)
    example = adapters()[adapter].example(module, torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    wanted, found = (example.compare(call(*example.args, **example.kwargs)) for call in (module, compiled))
    for name, value in wanted.items():
        assert_near(found[name], value)


@pytest.mark.parametrize("form", FORMS)
def test_the_proof_sees_a_thousandth(form: str) -> None:
    """A forward that is wrong by a thousandth does not pass."""
    make, *_ = FORMS[form]
    module = make()
    name, recognised = recognise(module)

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = recognised.forward(self, *args, **kwargs)
        return (bound[0] * 1.001, bound[1]) if isinstance(bound, tuple) else bound * 1.001

    candidate = Candidate(module, recognition.Recognised(recognised.form, wrong, recognised.uses))
    assert not verification.prove(candidate, adapters()[name]).passed


# ------------------------------------------------------------------------------------------------------ OpenFold IPA


@pytest.mark.parametrize("inplace", [False, True])
def test_ipa_takes_any_batch_axes_and_gives_nothing_that_it_was_given(inplace: bool) -> None:
    theirs, ours = twins(openfold.InvariantPointAttention())
    generator = torch.Generator().manual_seed(6)
    s, z = torch.randn(N, 24, generator=generator), torch.randn(N, N, 16, generator=generator)
    frames = random_rigid(1, N)
    mask = torch.ones(N)
    mask[-2:] = 0.0
    kept = s.clone(), z.clone()
    frames = type(frames)(frames.get_rots().get_rot_mats()[0], frames.get_trans()[0])
    out = ours(s, z, frames, mask, inplace_safe=inplace)
    assert_near(out, theirs(s, z, frames, mask), mask)
    out *= 0.0  # a parent may
    assert torch.equal(s, kept[0]) and torch.equal(z, kept[1])


def test_the_multimers_ipa_takes_its_own_frames() -> None:
    theirs, ours = twins(openfold.InvariantPointAttentionMultimer())
    (s, mask), (z, _) = single_inputs(24), pair_inputs(16)
    rigid = random_rigid(2, N)
    frames = openfold.Rigid3Array(rigid.get_rots().get_rot_mats(), rigid.get_trans())
    assert_near(ours(s, z, frames, mask), theirs(s, z, frames, mask), mask)


def test_an_offloaded_ipa_runs_its_own_forward() -> None:
    theirs, ours = twins(openfold.InvariantPointAttention())
    (s, mask), (z, _) = single_inputs(24), pair_inputs(16)
    with foldkernels.record_kernels() as ran:
        out = ours(s, None, random_rigid(2, N), mask, True, True, [z])
    assert ran == [] and torch.equal(out, theirs(s, None, random_rigid(2, N), mask, True, True, [z]))


# ----------------------------------------------------------------------------------------------- triangle operations


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        openfold.TriangleMultiplicationOutgoing,
        openfold.TriangleMultiplicationIncoming,
        openfold.FusedTriangleMultiplicationOutgoing,
    ],
)
def test_multiplication_in_place_changes_z_as_the_original_does(make: Callable[[], nn.Module], added: bool) -> None:
    theirs, ours = twins(make())
    z, mask = pair_inputs()
    results = []
    for module in (theirs, ours):
        given = z.clone()
        with torch.no_grad():
            out = module(given, mask, inplace_safe=True, _add_with_inplace=added)
        results.append((out, given, out is given))
    assert results[0][2] is results[1][2]
    assert_near(results[1][0], results[0][0])
    assert_near(results[1][1], results[0][1])


def test_without_chunks_in_place_the_original_runs() -> None:
    _, ours = twins(openfold.TriangleMultiplicationOutgoing())
    z, mask = pair_inputs()
    with torch.no_grad(), foldkernels.record_kernels() as ran:
        ours(z.clone(), mask, inplace_safe=True, _inplace_chunk_size=None)
    assert ran == []


@pytest.mark.parametrize("fused", [False, True])
def test_a_pair_stack_computes_the_same_in_place_and_with_gradients(fused: bool) -> None:
    theirs, ours = twins(openfold.PairStack(fused))
    assert len(foldkernels.accelerate(copy.deepcopy(theirs)).replaced) == 5
    z, mask = pair_inputs()
    with torch.no_grad():
        wanted, found = (module(z.clone(), mask, chunk_size=4) for module in (theirs, ours))
    assert_near(found, wanted, mask)
    assert_near(ours(z, mask), wanted, mask)


@pytest.mark.parametrize("make", [openfold.TriangleAttention, openfold.TriangleMultiplicationIncoming])
def test_templates_bring_batch_axes_and_masks_that_broadcast(make: Callable[[], nn.Module]) -> None:
    theirs, ours = twins(make())
    z, mask = pair_inputs(lead=(2, 3))
    assert_near(ours(z, mask[:, :1]), theirs(z, mask[:, :1]), mask)
    assert_near(ours(z), theirs(z))
    whole = (mask > 0.5).to(torch.int64)  # as ESMFold gives it
    assert_near(ours(z, whole), theirs(z, mask), mask)


@pytest.mark.parametrize("flag", ["use_memory_efficient_kernel", "use_deepspeed_evo_attention"])
def test_another_librarys_kernel_runs_where_the_caller_names_it(flag: str) -> None:
    _, ours = twins(openfold.TriangleAttention())
    z, mask = pair_inputs()
    with foldkernels.record_kernels() as ran:
        ours(z, mask, **{flag: True})
    assert ran == []
    with foldkernels.record_kernels() as ran:
        ours(z, mask, chunk_size=4, use_lma=True, inplace_safe=True)
    assert ran != []


def test_in_float16_the_original_runs() -> None:
    _, ours = twins(openfold.TriangleMultiplicationOutgoing())
    z, mask = pair_inputs()
    with foldkernels.record_kernels() as ran:
        ours.half()(z.half(), mask.half())
    assert ran == []


def test_a_boltz_layer_computes_the_same_with_gradients() -> None:
    theirs, ours = twins(boltz.PairformerLayer())
    (z, pair_mask), (s, mask) = pair_inputs(), single_inputs()
    mask[:, -2:] = 0.0
    results = []
    for module in (theirs, ours):
        out = module(s, z, mask, pair_mask)
        (out[0] * mask[..., None]).sum().backward()
        results.append((out, {name: p.grad for name, p in module.named_parameters()}))
    assert_near(results[1][0][0], results[0][0][0], mask)
    assert_near(results[1][0][1], results[0][0][1], pair_mask)
    largest = max(float(g.abs().max()) for g in results[0][1].values() if g is not None)
    for name, wanted in results[0][1].items():
        found = results[1][1][name]
        assert (found is None) == (wanted is None), name
        if wanted is not None:
            scale = max(float(wanted.abs().max()), 1e-2 * largest)
            assert float((found - wanted).abs().max()) <= 1e-4 * scale, name


# ---------------------------------------------------------------------------------------------------------- pair bias


def test_boltz_1_keeps_its_cache_and_its_multiplicity() -> None:
    theirs, ours = twins(boltz.boltz_1())
    (z, _), (s, _) = pair_inputs(), single_inputs()
    s = torch.cat([s, s + 1.0])
    mask = torch.ones(4, N)
    mask[1, -3:] = 0.0
    caches: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    with torch.no_grad():
        for _ in range(2):
            wanted, found = (
                module(s, z, mask, multiplicity=2, model_cache=cache)
                for module, cache in zip((theirs, ours), caches, strict=True)
            )
            assert_near(found, wanted, mask)
        assert_near(caches[1]["z"], caches[0]["z"])
        z = torch.zeros_like(z)  # the cache, not z, is read
        assert_near(ours(s, z, mask, 2, None, caches[1]), wanted, mask)


def test_boltz_1_attends_to_the_keys_it_is_given() -> None:
    theirs, ours = twins(boltz.boltz_1())
    (z, _), (s, mask) = pair_inputs(), single_inputs()
    chosen = torch.tensor([0, 3, 4, 6, 8])

    def to_keys(x: Tensor) -> Tensor:
        return x[:, chosen]

    assert_near(ours(s, z[:, :, chosen], mask, to_keys=to_keys), theirs(s, z[:, :, chosen], mask, to_keys=to_keys))


def test_boltz_2_attends_to_other_tokens() -> None:
    theirs, ours = twins(boltz.boltz_2())
    (z, _), (s, _) = pair_inputs(), single_inputs()
    k_in = torch.randn(2, 5, 15)
    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert_near(ours(s, z[:, :, :5], mask, k_in=k_in), theirs(s, z[:, :, :5], mask, k_in=k_in))


# -------------------------------------------------------------------------------------------------------- transitions


@pytest.mark.parametrize("make", [boltz.Transition, openfold.PairTransition])
def test_a_transition_goes_over_rows_without_gradients(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    from foldkernels.modules import transition

    monkeypatch.setattr(transition, "pairs_per_block", lambda x: 1)
    theirs, ours = twins(make())
    z, _ = pair_inputs()
    with torch.no_grad():
        assert_near(ours(z), theirs(z))
        assert_near(ours(z.transpose(1, 2), chunk_size=4), theirs(z.transpose(1, 2)))


# ---------------------------------------------------------------------------------------------------------------- ESM


def test_within_esm_2_the_weights_are_not_made() -> None:
    theirs, ours = twins(esm.ESM2().eval())
    report = foldkernels.accelerate(copy.deepcopy(theirs))
    assert report.replaced == ("", "layers.0.self_attn", "layers.1.self_attn")
    tokens = torch.randint(4, 24, (2, N), generator=torch.Generator().manual_seed(7))
    tokens[0, -3:] = 1
    with foldkernels.record_kernels() as ran:
        found = ours(tokens, repr_layers=[1])
    assert ran == ["attention: torch"] * 2
    wanted = theirs(tokens, repr_layers=[1])
    assert_near(found["logits"], wanted["logits"], tokens != 1)
    assert_near(found["representations"][1], wanted["representations"][1], tokens != 1)


@pytest.mark.parametrize("asked", [{"need_head_weights": True}, {"return_contacts": True}])
def test_weights_that_are_read_come_from_the_original(asked: dict[str, bool]) -> None:
    theirs, ours = twins(esm.ESM2().eval())
    tokens = torch.randint(4, 24, (2, N))
    with foldkernels.record_kernels() as ran:
        found = ours(tokens, **asked)
    assert ran == [] and torch.equal(found["attentions"], theirs(tokens, **asked)["attentions"])


def test_a_layer_that_is_called_alone_gives_its_weights() -> None:
    theirs, ours = twins(esm.ESM2().eval())
    x = torch.randn(N, 2, 24)
    for found, wanted in zip(ours.layers[0](x), theirs.layers[0](x), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "asked",
    [
        {"need_weights": True},
        {"need_weights": False, "attn_mask": torch.zeros(N, N)},
        {"need_weights": False, "need_head_weights": True},
    ],
)
def test_what_no_kernel_does_runs_the_original(asked: dict[str, Any]) -> None:
    _, ours = twins(esm.MultiheadAttention())
    x = torch.randn(N, 2, 24)
    with foldkernels.record_kernels() as ran:
        ours(x, x, x, **asked)
    assert ran == []


def test_dropout_in_training_runs_the_original() -> None:
    _, ours = twins(esm.MultiheadAttention(dropout=0.2))
    x = torch.randn(N, 2, 24)
    with foldkernels.record_kernels() as ran:
        ours.train()(x, x, x, need_weights=False)
        ours.eval()(x, x, x, need_weights=False)
    assert ran == ["attention: torch"]


@pytest.mark.parametrize(
    ("asked", "served"),
    [
        ({"use_cache": True, "output_attentions": True, "encoder_hidden_states": None}, True),
        ({"head_mask": torch.ones(2, 3, 1, 1)}, False),
        ({"attention_mask": torch.zeros(2, 1, N, N)}, False),
        ({"something_new": 1}, False),
    ],
)
def test_transformers_attention_serves_what_it_knows(asked: dict[str, Any], served: bool) -> None:
    theirs, ours = twins(esm.EsmSelfAttention())
    x = torch.randn(2, N, 24)
    with foldkernels.record_kernels() as ran:
        found = ours(x, **asked)
    assert ran == ["attention: torch"] * served and found[1] is None
    assert_near(found[0], theirs(x, **asked)[0])


def test_an_implementation_that_is_chosen_later_is_honoured() -> None:
    _, ours = twins(esm.EsmSelfAttention())
    ours.config._attn_implementation = "flash_attention_2"
    with foldkernels.record_kernels() as ran:
        ours(torch.randn(2, N, 24))
    assert ran == []


# --------------------------------------------------------------------------------------------------- what is declined


def test_this_packages_own_layers_need_nothing_although_they_have_the_names() -> None:
    model = PairformerLayer(16, 16, num_heads=2)
    foldkernels.bind(model, "reference")
    report = foldkernels.accelerate(model)
    assert report.replaced == () and report.misses == ()
    assert {entry.status for entry in report.entries} == {"needs nothing"} and len(report.entries) == 5
    assert foldkernels.restore(model) == 0
    assert model.tri_mul_out.kernel_config == model.attention.kernel_config != ""


def _changed(make: Callable[[], nn.Module], **attributes: Any) -> nn.Module:
    module = make()
    for name, value in attributes.items():
        where, _, last = name.rpartition("__")
        setattr(module.get_submodule(where.replace("__", ".")), last, value)
    return module


class _Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class _OpenFold3(openfold.TriangleMultiplicationOutgoing):
    def forward(self, z: Tensor, mask: Any = None, inplace_safe: bool = False, use_cueq: bool = False) -> Tensor:  # type: ignore[override]
        return z


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (_changed(openfold.TriangleAttention, inf=1.0), "its inf of 1.0 does not mask for certain"),
        (_changed(openfold.TriangleAttention, linear=_Scaled(12, 3, bias=False)), "its linear is a _Scaled"),
        (_changed(openfold.TriangleAttention, mha__no_heads=4), "its mha has other heads"),
        (_changed(openfold.TriangleAttention, mha__sigmoid=nn.Tanh()), "its mha.sigmoid is a Tanh"),
        (_changed(openfold.TriangleAttention, layer_norm=nn.BatchNorm1d(12)), "its layer_norm is a BatchNorm1d"),
        (_changed(openfold.TriangleAttention, mha__linear_g=openfold.Linear(12, 12, bias=False)), "mha.linear_g.bias"),
        (
            _changed(openfold.TriangleAttention, linear=openfold.Linear(12, 3, bias=False, precision=torch.float64)),
            "its linear has a precision of its own",
        ),
        (_changed(openfold.TriangleMultiplicationOutgoing, _outgoing=None), "`_outgoing`"),
        (_changed(openfold.TriangleMultiplicationIncoming, _outgoing=True), "do not agree"),
        (_changed(openfold.TriangleMultiplicationOutgoing, c_z=13), "its attributes say others"),
        (_as("TriangleMultiplicationOutgoing", _OpenFold3()), "its forward takes (z, mask=, inplace_safe=, use_cueq=)"),
        (_changed(openfold.InvariantPointAttention, is_multimer=True), "whether it is the multimer's cannot be told"),
        (_changed(openfold.InvariantPointAttention, inf=10.0), "its inf of 10.0"),
        (
            _changed(openfold.InvariantPointAttention, linear_q_points__num_points=5),
            "its linear_q_points is no PointProjection of 3 heads and 4 points",
        ),
        (_changed(boltz.boltz_2, compute_pair_bias=False), "whether z is a bias cannot be told"),
        (_changed(boltz.boltz_2, num_heads=5, head_dim=3), "proj_z.1.weight"),
        (_changed(boltz.boltz_1, proj_k=nn.Linear(15, 15)), "proj_k.bias"),
        (_changed(boltz.Transition, silu=nn.GELU()), "its silu is a GELU"),
        (_changed(openfold.PairTransition, relu=nn.GELU()), "its relu is a GELU"),
        (esm.MultiheadAttention(rotary=False), "it has no rotary positions"),
        (_changed(esm.MultiheadAttention, add_zero_attn=True), "its add_zero_attn is True"),
        (_changed(esm.MultiheadAttention, scaling=1.0), "its scaling is 1.0"),
        (nn.MultiheadAttention(8, 2), "it is PyTorch's own"),
        (esm.EsmSelfAttention(implementation="eager"), "gives out the attention weights, which no kernel makes"),
        (esm.EsmSelfAttention(implementation="flash_attention_2"), "names a kernel of its own"),
        (_changed(esm.EsmSelfAttention, is_decoder=True), "it is a decoder's"),
        (_changed(esm.EsmSelfAttention, position_embedding_type="relative_key"), "its positions are 'relative_key'"),
    ],
)
def test_another_function_is_left_alone_with_the_reason(module: nn.Module, reason: str) -> None:
    report = foldkernels.accelerate(nn.Sequential(module))
    assert report.replaced == ()
    assert reason in report.left_alone["0"]
