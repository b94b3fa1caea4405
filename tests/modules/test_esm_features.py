"""The frozen language model and its combiner: the goldens, chains, padding, streaming, the cache, and the model."""

import copy
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from foldkernels.compat import esm
from foldkernels.compat.multiflow.checkpoint.files import Checkpoint
from foldkernels.compat.multiflow.checkpoint.loading import build
from foldkernels.compat.multiflow.model import FlowModel
from foldkernels.configs.options import FoldkernelsConfig
from foldkernels.errors import BadInput
from foldkernels.kernels.attention import flash_attn
from foldkernels.kernels.registry import KernelUnavailable, record_kernels
from foldkernels.kernels.registry.binding import bind
from foldkernels.kernels.registry.types import Reason, Request
from foldkernels.modules import frozen_esm
from foldkernels.modules.esm2 import ESM2
from foldkernels.modules.esm_alphabet import Alphabet
from foldkernels.modules.esm_chains import ChainJoiner
from foldkernels.modules.esm_combiner import ESMCombiner
from foldkernels.modules.frozen_esm import FrozenESM, LanguageModel

from ..support.goldens import batch_of, model_of, small_checkpoint
from ..support.standins import restored, stand_in

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "cogeneration"
TINY = GOLDENS.parent / "esm" / "esm2_t3_tiny.pt"
Batch = tuple[Tensor, Tensor, Tensor]


def golden(only_single: bool) -> dict[str, Tensor]:
    return load_file(GOLDENS / f"esm_combiner_single{int(only_single)}.safetensors")


def language_model() -> ESM2:
    """The goldens' own, which only the first of them holds, under Hugging Face's names."""
    found = golden(False)
    return esm.load({n.removeprefix("w_esm_hf."): w for n, w in found.items() if n.startswith("w_esm_hf.")})[0]


def combiner(only_single: bool = False, **more: Any) -> ESMCombiner:
    frozen = FrozenESM(language_model(), pairs=not only_single, **more)
    made = ESMCombiner(frozen, 32, 16, 32, only_single)
    weights = {n.removeprefix("w."): w for n, w in golden(only_single).items() if n.startswith("w.")}
    made.load_state_dict(weights, strict=True)
    bind(made, "torch")
    return made


def proteins(n: int = 11) -> Batch:
    """Two proteins of three chains and one, a masked type, a residue that is missing, padding."""
    generator = torch.Generator().manual_seed(n)
    aatypes = torch.randint(0, 20, (2, n), generator=generator)
    aatypes[:, 2] = 20
    chains = torch.tensor([[1] * 3 + [2] * 4 + [5] * (n - 7), [3] * n])
    mask = torch.ones(2, n)
    mask[0, 5] = 0
    mask[1, 7:] = 0
    return aatypes, chains, mask


# The goldens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["torch", "reference"])
@pytest.mark.parametrize("only_single", [False, True])
def test_the_goldens_are_reached(only_single, kernel):
    """In them no residue is padding: those that take no part are of unknown type."""
    x, model = golden(only_single), combiner(only_single)
    bind(model, kernel)
    given = (x["in.aatypes"], x["in.chain_index"], x["in.res_mask"], torch.ones_like(x["in.res_mask"]))
    chains = model.esm.joiner(*given)
    assert torch.equal(chains.tokens, x["esm_tokens"])
    at = torch.zeros_like(x["non_linker_mask"]).scatter_(1, chains.places, True)
    assert torch.equal(at, x["non_linker_mask"])
    with record_kernels() as ran:
        features = model.esm(*given)
    assert set(ran) == {f"attention: {kernel}"}
    assert (features.single - x["esm.single"]).abs().max() < 5e-6
    assert (features.logits - x["esm.logits"]).abs().max() < 2e-5
    if not only_single:
        assert (features.pair() - x["esm.pair"]).abs().max() < 2e-6
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            nodes, edges = model(x["in.node_embed"], x["in.edge_embed"], *given)
        assert (nodes - x["out.node_embed"]).abs().max() < 5e-6
        assert (edges - x["out.edge_embed"]).abs().max() < 5e-6
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            changed = model(x["in.node_embed"], x["in.edge_embed"], *given)
            parameter.copy_(x[f"w.{name}"])
        difference = max(float((a - b).detach().abs().max()) for a, b in zip(changed, (nodes, edges), strict=True))
        # The last bias of pair_proj.0 reaches the edges through weights of its own.
        assert difference > 1e-4, name


# Chains ---------------------------------------------------------------------------------------------------------------


def test_how_chains_are_joined():
    aatypes, chains, mask = proteins(9)
    alphabet = Alphabet()
    found = ChainJoiner(alphabet)(aatypes, chains, mask)
    words = [alphabet.get_tok(int(i)) for i in found.tokens[0]]
    ends = [i for i, word in enumerate(words) if word == "<eos>"]
    assert words[0] == "<cls>" and ends == [4, 9, 12] and words[3] == "<mask>" and words[7] == "X"
    assert found.lengths == (13, 9) and found.tokens[1, 8] == alphabet.eos_idx
    assert found.tokens[1, 9:].eq(alphabet.padding_idx).all() and found.kept[1].tolist() == [True] * 7 + [False] * 2
    letters = "ARNDCQEGHILKMFPSTWYV"
    for i in (0, 1, 3, 4, 8):
        assert words[int(found.places[0, i])] == letters[int(aatypes[0, i])]


@pytest.mark.parametrize(
    ("linker", "offset", "expected"),
    [
        ("<eos>", 0, ["A", "<eos>", "R", "N"]),
        ("<eos><cls>", 0, ["A", "<eos>", "<cls>", "R", "N"]),
        ("GGG", 512, ["A", "G", "G", "G", "R", "N"]),
        ("", 7, ["A", "R", "N"]),
    ],
)
def test_linkers_and_offsets(linker, offset, expected):
    alphabet = Alphabet()
    joiner = ChainJoiner(alphabet, linker, offset)
    found = joiner(torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 1]]), torch.ones(1, 3))
    assert [alphabet.get_tok(int(i)) for i in found.tokens[0, 1:-1]] == expected
    second = int(found.places[0, 1])
    expected_positions = [i + (offset if i >= second else 0) for i in range(len(expected) + 2)]
    assert found.positions[0].tolist() == expected_positions


def test_chains_see_one_another_by_the_linker_and_the_offset():
    aatypes, chains, mask = proteins()
    model = language_model()
    found = [
        FrozenESM(model, False, **how)(aatypes, chains, mask).single
        for how in ({}, {"linker": "G" * 25}, {"residue_index_offset": 512})
    ]
    for other in found[1:]:
        assert (other[0] - found[0][0]).abs().max() > 1e-3
        torch.testing.assert_close(other[1], found[0][1], atol=1e-5, rtol=0)


# Padding, types, devices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("only_single", [False, True])
def test_padding_changes_nothing(only_single):
    model = combiner(only_single).eval()
    aatypes, chains, mask = proteins()
    torch.manual_seed(0)
    nodes, edges = torch.randn(2, 11, 32), torch.randn(2, 11, 11, 16)
    wide = [torch.nn.functional.pad(x, (0, 4)) for x in (aatypes, chains, mask)]
    with torch.no_grad():
        found = model(nodes, edges, aatypes, chains, mask)
        padded = model(
            torch.nn.functional.pad(nodes, (0, 0, 0, 4)), torch.nn.functional.pad(edges, (0, 0, 0, 4, 0, 4)), *wide
        )
        alone = model(nodes[1:, :7], edges[1:, :7, :7], aatypes[1:, :7], chains[1:, :7], mask[1:, :7])
    torch.testing.assert_close(padded[0][:, :11], found[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(padded[1][:, :11, :11], found[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(alone[0][0], found[0][1, :7], atol=1e-5, rtol=0)
    torch.testing.assert_close(alone[1][0], found[1][1, :7, :7], atol=1e-5, rtol=0)
    gone = mask < 0.5
    for nodes_out, edges_out in (found, [x[:, :11] for x in padded]):
        assert (
            not nodes_out[gone].any()
            and not edges_out[gone].any()
            and not edges_out.transpose(1, 2)[:, :11][gone].any()
        )


@pytest.mark.parametrize(("dtype", "reach"), [(torch.bfloat16, 0.2), (torch.float16, 0.03), (torch.float64, 1e-5)])
def test_the_floating_type_is_a_choice_that_stays(dtype, reach):
    given = proteins()
    truth = FrozenESM(language_model())(*given)
    frozen = FrozenESM(language_model(), dtype=dtype)
    holder = torch.nn.ModuleList([frozen]).double().half().float()
    found = holder[0](*given)
    assert found.single.dtype is dtype and frozen.language_model.dtype is dtype
    assert (found.single.double() - truth.single).abs().max() < reach
    assert (found.pair().double() - truth.pair()).abs().max() < reach
    shared = LanguageModel(language_model(), torch.bfloat16)
    assert FrozenESM(shared).language_model is shared
    with pytest.raises(ValueError, match="language model computes in"):
        FrozenESM(shared, dtype=torch.float16)


def test_a_half_precision_language_model_under_a_float32_combiner():
    x, given = golden(False), proteins(14)
    exact, rounded = combiner(), combiner(dtype=torch.bfloat16)
    with torch.no_grad():
        found = [model(x["in.node_embed"], x["in.edge_embed"], *given) for model in (exact, rounded)]
    for a, b in zip(*found, strict=True):
        assert a.dtype is b.dtype is torch.float32 and 0 < (a - b).abs().max() < 0.1


def test_pairs_in_bfloat16():
    x, given = golden(False), proteins(14)
    edges = x["in.edge_embed"].bfloat16()
    model = combiner()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = model(x["in.node_embed"], edges, *given)[1]
        assert out.dtype is torch.bfloat16
        exact = model(x["in.node_embed"], edges.float(), *given)[1]
        assert (out - exact).abs().max() < 0.05


# Frozen ---------------------------------------------------------------------------------------------------------------


def test_it_is_frozen_and_in_no_checkpoint():
    model = combiner().train()
    frozen = model.esm
    assert not any(name.startswith("esm.") for name in model.state_dict())
    assert not any(name.startswith("esm.") for name, _ in model.named_parameters())
    assert not frozen.training and not frozen.language_model.model.training
    features = frozen(*proteins())
    assert not features.single.requires_grad and not features.pair().requires_grad
    assert all(not p.requires_grad for p in frozen.language_model.model.parameters())


def test_copies_share_it_and_moves_move_it():
    model = combiner()
    other = copy.deepcopy(model)
    assert other.esm.language_model is model.esm.language_model
    given = proteins()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.esm(*given).single, model.esm(*given).single)
    model.to("meta")
    assert model.esm.language_model.device.type == "cpu"  # what has no data cannot be moved back
    assert model.esm(*given).single.isfinite().all()


def test_two_models_with_other_kernels_share_one():
    shared = LanguageModel(language_model())
    first, second = FrozenESM(shared), FrozenESM(shared)
    bind(first, "torch")
    bind(second, "reference")
    for frozen, kernel in ((first, "torch"), (second, "reference"), (first, "torch")):
        with record_kernels() as ran:
            frozen(*proteins()).pair()
        assert set(ran) == {f"attention: {kernel}"}


def test_maps_of_a_kernel_that_has_none_is_an_error_at_build_time():
    with pytest.raises(KernelUnavailable) as refusal:
        bind(FrozenESM(language_model(), pairs=True), {"attention": "flash_attn"})
    for words in ("flash-attn never forms them", "kernel: {attention: torch}", "only_single: true"):
        assert words in str(refusal.value)
    with pytest.raises(ValueError, match="pairs=True, or set only_single"):
        ESMCombiner(FrozenESM(language_model(), pairs=False), 32, 16)
    with pytest.raises(ValueError, match="pairs=True"):
        FrozenESM(language_model(), pairs=False)(*proteins()).pair()


def test_what_is_bound_is_what_runs():
    """The language model's own floating type decides, not its holder's; and where it is, not where nothing is."""
    frozen = FrozenESM(language_model(), dtype=torch.bfloat16)
    holder = torch.nn.ModuleList([torch.nn.Linear(2, 2), frozen])
    for report in (bind(holder, "torch"), bind(frozen, "torch")):
        assert {decision.request.dtype for decision in report.decisions()} == {torch.bfloat16}
    assert "place" not in dict(holder.state_dict())
    # The angles of a float16 file are rounded alike in every layer; those of a model cast to it are not rounded.
    assert frozen.language_model.model.layers[0].self_attn.rot_emb.inv_freq.dtype is torch.float32


# Streaming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_rows_are_cut_anywhere(rows, monkeypatch):
    """The maps are never all there: no tensor of their size is made, forward or backward."""
    model, given = combiner(), proteins(14)
    x = golden(False)
    nodes, edges = x["in.node_embed"], x["in.edge_embed"]
    expected = model(nodes, edges, *given)
    before = torch.autograd.grad(sum(y.square().sum() for y in expected), list(model.parameters()))
    features, longest = 6, 14 + 2 + 2
    monkeypatch.setattr(frozen_esm, "_WEIGHTS_AT_ONCE", rows * features * longest)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made = (x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor) and x.ndim == 4)
            # Keys, as they are multiplied, have the head size in the place of rows.
            sizes.extend(x.shape[2] * x.shape[3] for x in made if x.shape[1] == features and x.shape[2] != 8)
            return out

    with Watch():
        found = model(nodes, edges, *given)
        after = torch.autograd.grad(sum(y.square().sum() for y in found), list(model.parameters()))
        with torch.no_grad():
            quiet = model(nodes, edges, *given)
    assert sizes and max(sizes) <= rows * longest
    for a, b, c in zip(found, expected, quiet, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
        torch.testing.assert_close(c, b, atol=1e-5, rtol=0)
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_gradients_are_the_written_out_formula_s():
    """Against the modules called one after the other on all maps at once, in float64."""
    model = combiner(dtype=torch.float64).double()
    given = proteins(14)
    x = golden(False)
    nodes = x["in.node_embed"].double().requires_grad_()
    edges = x["in.edge_embed"].double().requires_grad_()
    mask = given[2] > 0.5
    leaves = [nodes, edges, *model.parameters()]

    def written_out() -> tuple[Tensor, Tensor]:
        features = model.esm(*given)
        mixed = (features.single * model.esm_single_combine.softmax(0)[:, None]).sum(2)
        single = model.single_layer_norm(0.5 * (model.seq_proj(mixed) + nodes)) * mask[..., None]
        pair = model.pair_layer_norm(0.5 * (model.pair_proj(features.pair()) + edges))
        return single, pair * (mask[:, None] & mask[:, :, None])[..., None]

    results = []
    for call in (lambda: model(nodes, edges, *given), written_out):
        out = call()
        torch.manual_seed(3)
        loss = sum((y * torch.randn_like(y)).sum() for y in out)
        results.append([*out, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


def test_edges_may_be_written_over():
    model, given, x = combiner(), proteins(14), golden(False)
    with torch.no_grad():
        expected = model(x["in.node_embed"], x["in.edge_embed"], *given)[1]
        mine = x["in.edge_embed"].clone()
        out = model(x["in.node_embed"], mine, *given, overwrite_z=True)[1]
    assert out is mine and torch.equal(out, expected)


# The cache ------------------------------------------------------------------------------------------------------------


def test_the_cache_is_keyed_by_all_that_counts_and_bounded():
    frozen = FrozenESM(language_model(), cache=2)
    bind(frozen, "torch")
    aatypes, chains, mask = proteins()
    runs: list[None] = []
    original = frozen._features
    frozen._features = lambda *a: (runs.append(None), original(*a))[1]  # type: ignore[method-assign]

    def ran(*given: Tensor) -> bool:
        before = len(runs)
        frozen(*given)
        return len(runs) > before

    assert ran(aatypes, chains, mask) and not ran(aatypes.clone(), chains, mask)
    other = aatypes.clone()
    other[0, 0] = (other[0, 0] + 1) % 20
    assert ran(other, chains, mask) and not ran(other, chains, mask) and not ran(aatypes, chains, mask)
    one = chains.clone()
    one[0] = 1
    assert ran(aatypes, one, mask), "chains"
    assert ran(other, chains, mask), "only two are kept, the last used"
    fewer = mask.clone()
    fewer[1, 6] = 0
    assert ran(aatypes, chains, fewer), "mask"
    assert ran(aatypes, chains, mask, torch.ones_like(mask)), "padding"
    assert not ran(aatypes, chains, mask, torch.ones_like(mask))
    with torch.no_grad():
        frozen.language_model.model.layers[0].fc1.weight.mul_(1.1)
    assert ran(aatypes, chains, mask, torch.ones_like(mask)), "weights"
    frozen.language_model.model.bfloat16()
    assert ran(aatypes, chains, mask, torch.ones_like(mask)), "floating type"
    bind(frozen, "reference")
    assert ran(aatypes, chains, mask, torch.ones_like(mask)), "kernel"
    assert len(frozen._cache) == 2


def test_files_are_shared():
    first = esm.shared(TINY)
    assert esm.shared(str(TINY)) is first and esm.shared(TINY, torch.bfloat16) is not first
    held = weakref.ref(first)
    del first
    assert held() is None


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, c, m: t.__setitem__((1, 3), 21), "residue 3 of protein 1 has type 21"),
        (lambda t, c, m: t.__setitem__((0, 0), -1), "has type -1"),
        (lambda t, c, m: m.__setitem__(1, 0.0), "protein 1 of 2 has no residue"),
    ],
)
def test_proteins_that_cannot_be_read(change, said):
    given = proteins()
    change(*given)
    with pytest.raises(ValueError, match=said) as refusal:
        FrozenESM(language_model())(*given)
    assert "expected" in str(refusal.value)


def test_what_a_masked_residue_holds_is_not_read():
    aatypes, chains, mask = proteins()
    frozen = FrozenESM(language_model())
    other = aatypes.masked_fill(mask < 0.5, 99)
    assert torch.equal(frozen(other, chains, mask).single, frozen(aatypes, chains, mask).single)


@pytest.mark.parametrize(
    ("how", "said"),
    [({"linker": "<end>"}, "linker: '<' at"), ({"residue_index_offset": -1}, "negative"), ({"cache": -1}, "negative")],
)
def test_settings_that_are_wrong(how, said):
    with pytest.raises(ValueError, match=said):
        FrozenESM(language_model(), **how)


@pytest.mark.parametrize("only_single", [False, True])
def test_compiled_it_gives_the_same(only_single):
    """The language model stands between two graphs: none can hold it, because the batch's numbers say what it reads."""
    model, given, g = combiner(only_single).eval(), proteins(14), torch.Generator().manual_seed(0)
    x = [torch.randn(2, 14, 32, generator=g), torch.randn(2, 14, 14, 16, generator=g), *given]
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")(*x)
        assert all(torch.equal(a, b) for a, b in zip(compiled, model(*x), strict=True))
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="FrozenESM"):
            torch.compile(model, backend="eager", fullgraph=True)(*x)
    torch._dynamo.reset()


# In Multiflow's model -------------------------------------------------------------------------------------------------


def multiflow(checkpoint: str | None, **more: Any) -> FlowModel:
    torch.manual_seed(0)
    settings = {"esm_combiner": {"checkpoint": checkpoint, **more}}
    model = FlowModel(small_checkpoint().config.model, FoldkernelsConfig.model_validate(settings))
    model.load_state_dict(model_of("small").state_dict(), strict=False)
    bind(model, "torch")
    return model.eval()


def test_absent_the_model_is_multiflow_s():
    model = multiflow(None)
    assert model.esm_combiner is None
    assert list(model.state_dict()) == list(model_of("small").state_dict())


@pytest.mark.parametrize("only_single", [False, True])
def test_in_the_model_it_moves_the_result_and_padding_does_not(only_single):
    model = multiflow(str(TINY), only_single=only_single)
    added = {name for name in model.state_dict() if name.startswith("esm_combiner.")}
    assert set(model.state_dict()) == set(model_of("small").state_dict()) | added
    assert any("pair_proj" in name for name in added) is not only_single
    assert not any("embed_tokens" in name for name in added)
    batch = batch_of("small/case_L17.safetensors")
    with torch.no_grad(), record_kernels() as ran:
        found, plain = model(batch), model_of("small")(batch)
        other = model({**batch, "aatypes_t": (batch["aatypes_t"] + 1) % 20})
        longer = {name: _longer(x) for name, x in batch.items()}
        padded = model(longer)
    assert "attention: torch" in ran
    there = batch["res_mask"] > 0.5
    for name in ("pred_trans", "pred_rotmats", "pred_logits"):
        assert (found[name] - plain[name])[there].abs().max() > 1e-3
        assert (found[name] - other[name])[there].abs().max() > 1e-3
        torch.testing.assert_close(padded[name][:, :17][there], found[name][there], atol=2e-4, rtol=0)


def _longer(x: Tensor) -> Tensor:
    """Three residues of padding more."""
    if x.ndim < 2 or x.shape[1] != 17:
        return x
    more = x[:, -1:].expand(-1, 3, *x.shape[2:]).clone()
    return torch.cat([x, torch.zeros_like(more) if x.ndim == 2 else more], 1)


def test_it_trains_in_the_model():
    model = multiflow(str(TINY)).train()
    out = model(batch_of("small/case_L17.safetensors"))
    (out["pred_trans"].sum() + out["pred_logits"].square().sum()).backward()
    assert model.esm_combiner is not None
    for name, parameter in model.esm_combiner.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_a_trained_checkpoint_loads(tmp_path):
    """What the section names is read from its own file; the checkpoint holds the combiner alone."""
    model = multiflow(str(TINY))
    base = small_checkpoint()
    config = OmegaConf.merge(base.config, {"foldkernels": {"esm_combiner": str(TINY)}})
    loaded = build(Checkpoint(model.state_dict(), config, base.source), "torch")
    batch = batch_of("small/case_L17.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(batch)["pred_trans"], model(batch)["pred_trans"])
    assert loaded.esm_combiner is not None and model.esm_combiner is not None
    assert loaded.esm_combiner.esm.language_model is model.esm_combiner.esm.language_model
    with pytest.raises(
        BadInput, match=r"foldkernels\.esm_combiner, whose weights are not[\s\S]*checkpoint: .*init: zero"
    ):
        build(Checkpoint(base.state_dict, config, base.source))


@pytest.mark.parametrize("only_single", [False, True])
def test_started_as_zero_the_model_is_unchanged_and_then_learns(only_single):
    base = small_checkpoint()
    section = {"checkpoint": str(TINY), "only_single": only_single, "init": "zero"}
    config = OmegaConf.merge(base.config, {"foldkernels": {"esm_combiner": section}})
    model, plain = build(Checkpoint(base.state_dict, config, base.source), "torch"), model_of("small", "torch")
    assert model.fresh == ("esm_combiner",)
    batch, outputs = batch_of("small/case_L17.safetensors"), ("pred_trans", "pred_rotmats", "pred_logits")
    with torch.no_grad():
        without = plain(batch)
        assert all(torch.equal(model(batch)[name], without[name]) for name in outputs)
    start = {name: p.detach().clone() for name, p in model.esm_combiner.named_parameters()}
    assert ("edge_gate" in start) is not only_single
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):  # the first step opens the gates
        optimizer.zero_grad()
        found = model(batch)
        (found["pred_trans"].sum() + found["pred_logits"].square().sum()).backward()
        optimizer.step()
    assert not [name for name, p in model.esm_combiner.named_parameters() if torch.equal(p, start[name])]
    again = build(Checkpoint(model.state_dict(), config, base.source), "torch")
    assert again.fresh == ()
    with torch.no_grad():
        assert all(torch.equal(again(batch)[name], model(batch)[name]) for name in outputs)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"checkpoint": "/nowhere/esm2_t6_8M_UR50D.pt"}, "esm_combiner.checkpoint: .*no such file"),
        ({"checkpoint": str(TINY), "linker": "?"}, r"esm_combiner: linker: '\?' at position 1"),
    ],
)
def test_settings_of_the_section_that_are_wrong(settings, said):
    with pytest.raises(BadInput, match=said):
        multiflow(**settings)


def test_flash_attn_and_pairs_in_the_model():
    """On a machine where flash-attn serves all but maps: an error with pairs, none without."""

    def all_but_maps(request: Request) -> list[Reason]:
        return [reason for reason in flash_attn.supports(request) if "maps" in reason.why]

    base = small_checkpoint()
    with restored():
        stand_in("flash_attn", all_but_maps)
        for only_single in (True, False):
            section = {"checkpoint": str(TINY), "only_single": only_single}
            config = OmegaConf.merge(
                base.config, {"foldkernels": {"esm_combiner": section}, "model": {"transformer_dropout": 0.0}}
            )
            checkpoint = Checkpoint(multiflow(**section).state_dict(), config, base.source)
            if only_single:
                build(checkpoint, {"attention": "flash_attn"})
                continue
            with pytest.raises(KernelUnavailable, match="never forms them") as refusal:
                build(checkpoint, {"attention": "flash_attn"})
            assert "kernel: {attention: torch}" in str(refusal.value) and "only_single: true" in str(refusal.value)
