"""ESM-2 against fair-esm: its numbers, its files, its calls, and what padding may not do."""

import argparse
import copy
import importlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foldkernels.compat import esm
from foldkernels.errors import BadInput
from foldkernels.kernels.attention import attention_maps
from foldkernels.kernels.registry import KernelUnavailable, record_kernels
from foldkernels.kernels.registry.binding import bind
from foldkernels.kernels.testing.accuracy import required
from foldkernels.modules.esm2 import ESM2
from foldkernels.modules.esm_alphabet import Alphabet
from foldkernels.modules.length_groups import Group, groups_of

pytestmark = pytest.mark.quick

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
TINY = GOLDENS / "esm" / "esm2_t3_tiny.pt"
#: What a golden may be missed by.
REACH = {"repr": 5e-6, "attentions": 2e-6, "logits": 2e-5, "contacts": 1e-5}
each_kernel = pytest.mark.parametrize("kernel", ["torch", "reference"])


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def tiny(kernel: Any = "torch") -> ESM2:
    return esm.load(TINY, kernel)[0]


def drawn(seed: int = 0, **sizes: int) -> ESM2:
    """A model whose weights are nowhere zero."""
    torch.manual_seed(seed)
    model = ESM2(**{"num_layers": 2, "embed_dim": 32, "attention_heads": 4, **sizes})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.2)
    return model.eval()


def batch(*lengths: int, masks: bool = True) -> Tensor:
    """Random residues, some of them masked, between BOS and EOS, padded."""
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = torch.full((len(lengths), max(lengths) + 2), 1)
    for row, length in zip(tokens, lengths, strict=True):
        row[1 : length + 1] = torch.randint(4, 24, (length,), generator=generator)
        if masks:
            row[1 : length + 1 : 5] = 32
        row[0], row[length + 1] = 0, 2
    return tokens


def everything(model: ESM2, tokens: Tensor) -> dict[str, Any]:
    return model(tokens, repr_layers=range(model.num_layers + 1), need_head_weights=True, return_contacts=True)


# The goldens ----------------------------------------------------------------------------------------------------------


@each_kernel
@pytest.mark.parametrize("case", ["nopad", "pad"])
def test_the_goldens_are_reached(case, kernel):
    golden = load_file(GOLDENS / "esm" / f"tiny_case_{case}.safetensors")
    tokens, there = golden["tokens"], golden["tokens"] != 1
    model = tiny(kernel)
    with record_kernels() as ran:
        found = everything(model, tokens)
    assert set(ran) == {f"attention: {kernel}"}
    for layer in range(4):
        error = (found["representations"][layer] - golden[f"repr.{layer}"])[there].abs().max()
        assert error < REACH["repr"]
    assert (found["logits"] - golden["logits"])[there].abs().max() < REACH["logits"]
    for name in ("attentions", "contacts"):
        assert (found[name] - golden[name]).abs().max() < REACH[name]
    assert (model.predict_contacts(tokens) - golden["contacts"]).abs().max() < REACH["contacts"]


@pytest.mark.parametrize("part", ["embed_tokens", "q_proj", "rot_emb.inv_freq", "fc2", "emb_layer_norm", "regression"])
def test_a_changed_weight_is_seen(part):
    golden = load_file(GOLDENS / "esm" / "tiny_case_pad.safetensors")
    model = tiny()
    for name, tensor in model.state_dict().items():
        if part in name and not name.endswith("bias"):
            tensor.mul_(1.05)
    found = everything(model, golden["tokens"])
    there = golden["tokens"] != 1
    logits = (found["logits"] - golden["logits"])[there].abs().max()
    contacts = (found["contacts"] - golden["contacts"]).abs().max()
    assert logits > 100 * REACH["logits"] or contacts > 100 * REACH["contacts"]


# fair-esm itself ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fair() -> ModuleType:
    try:
        module = importlib.import_module("esm")
        importlib.import_module("esm.pretrained")
    except Exception as error:
        pytest.skip(f"fair-esm is not installed (pip install '.[esm]'): {error}")
    if not hasattr(module, "Alphabet"):
        pytest.skip("the `esm` that is installed is not fair-esm")
    return module


@each_kernel
@pytest.mark.parametrize("lengths", [(17,), (30, 30), (33, 7, 1, 20)], ids=str)
def test_every_output_is_fair_esm_s(fair, kernel, lengths):
    torch.manual_seed(1)
    theirs = fair.ESM2(3, 40, 4, "ESM-1b").eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    ours = ESM2(3, 40, 4).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    bind(ours, kernel)
    tokens = batch(*lengths)
    expected, found = everything(theirs, tokens), everything(ours, tokens)
    there = tokens != 1
    assert found.keys() == expected.keys()
    assert list(found["representations"]) == list(expected["representations"])
    for layer, x in expected["representations"].items():
        torch.testing.assert_close(found["representations"][layer][there], x[there], atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(found["logits"][there], expected["logits"][there], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found["attentions"], expected["attentions"], atol=2e-6, rtol=0)
    torch.testing.assert_close(found["contacts"], expected["contacts"], atol=1e-5, rtol=0, equal_nan=True)
    assert ours(tokens).keys() == theirs(tokens).keys()


def test_fair_esm_s_loader_gives_the_same(fair, monkeypatch):
    trusting = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **more: trusting(*args, **{**more, "weights_only": False}))
    theirs, their_alphabet = fair.pretrained.load_model_and_alphabet_local(TINY)
    ours, alphabet = esm.load(TINY)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(x, theirs.state_dict()[name]) for name, x in ours.state_dict().items())
    pairs = [("a", "MKTAYIAK"), ("b", "GX-.BZUO<mask>LL"), ("c", "A C<eos>D")]
    for cut in (None, 5):
        found, expected = (x.get_batch_converter(cut)(pairs) for x in (alphabet, their_alphabet))
        assert found[0] == list(expected[0]) and found[1] == list(expected[1]) and torch.equal(found[2], expected[2])
    for name, value in vars(their_alphabet).items():
        assert getattr(alphabet, name) == value, name
    assert alphabet.to_dict() == their_alphabet.to_dict() and len(alphabet) == len(their_alphabet)
    names = ("num_layers", "embed_dim", "attention_heads", "padding_idx", "mask_idx", "token_dropout", "prepend_bos")
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]


@pytest.mark.parametrize("component", ["forward", "ragged", "maps", "contacts", "features"])
def test_the_benchmark_s_check(fair, component, monkeypatch):
    """Both of its sides compute the same, at a length that takes no time."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    esm_cpu: Any = importlib.import_module("benchmarks.studies.esm_cpu")
    monkeypatch.setattr(esm_cpu, "LAYERS", 2)
    correct, words = esm_cpu.check(esm_cpu.Task(component, 24))
    assert correct, words


# Padding --------------------------------------------------------------------------------------------------------------


@each_kernel
def test_padding_changes_nothing(kernel):
    """Alone, beside longer ones, and with more padding than any needs: the same numbers; zeros in padding."""
    model = tiny(kernel)
    lengths = (19, 5, 12, 12, 1)
    tokens = batch(*lengths)
    wide = torch.nn.functional.pad(tokens, (0, 3), value=1)
    together = everything(model, wide)
    for row, length in enumerate(lengths):
        n = length + 2
        alone = everything(model, tokens[row : row + 1, :n])
        for layer, x in together["representations"].items():
            torch.testing.assert_close(x[row, :n], alone["representations"][layer][0], atol=1e-5, rtol=0)
            assert not x[row, n:].any()
        torch.testing.assert_close(together["logits"][row, :n], alone["logits"][0], atol=1e-5, rtol=0)
        torch.testing.assert_close(together["attentions"][row, :, :, :n, :n], alone["attentions"][0], atol=1e-5, rtol=0)
        contacts = together["contacts"][row, :length, :length]
        torch.testing.assert_close(contacts, alone["contacts"][0], atol=1e-5, rtol=0, equal_nan=True)
        assert not together["logits"][row, n:].any() and not together["attentions"][row, :, :, n:].any()


def test_padding_inside_a_sequence_is_no_key():
    """As it may be: the tokens behind it keep their places, and see the others alone."""
    model = tiny()
    tokens = batch(14)
    tokens[0, 6:9] = 1
    found = model(tokens, repr_layers=[3])["representations"][3]
    other = tokens.repeat(2, 1)
    other[1] = batch(14)[0]
    both = model(other, repr_layers=[3])["representations"][3]
    torch.testing.assert_close(found[0], both[0], atol=1e-5, rtol=0)
    assert not found[0, 6:9].any()
    dense = [layer.x for layer in model.layers_of(other, other != 1)][-1]
    torch.testing.assert_close(both[other != 1], dense[other != 1], atol=1e-5, rtol=0)


def test_groups():
    lengths = (5, 9, 5, 0, 3, 9)
    present = torch.arange(12) < torch.tensor(lengths)[:, None]
    present[4, 1] = False
    assert groups_of(present) == [
        Group((1, 5), 9, True),
        Group((0, 2), 5, True),
        Group((4,), 3, False),
    ]
    many = groups_of(torch.ones(5, 1000, dtype=torch.bool))
    assert [group.rows for group in many] == [(0, 1), (2, 3), (4,)]


def test_only_padding():
    found = tiny()(torch.ones(2, 4, dtype=torch.int64), repr_layers=[1])
    assert found["logits"].shape == (2, 4, 33) and not found["logits"].any()


def test_sequences_in_chunks_and_gradients_through_them():
    model = drawn()
    tokens = batch(9, 4, 9)
    with torch.enable_grad():
        found = everything(model, tokens)
        (found["logits"].square().sum() + found["attentions"].square().sum()).backward()
    grouped = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.enable_grad():
        parts = model._pass(tokens, tokens != 1, set(), True)
        (parts["logits"].square().sum() + parts["attentions"].square().sum()).backward()
    assert grouped.keys() == {n for n, _ in model.named_parameters() if not n.startswith("contact_head")}
    for name, parameter in model.named_parameters():
        if name in grouped:
            assert parameter.grad is not None
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(grouped[name], parameter.grad, atol=1e-5 * max(scale, 1.0), rtol=1e-4)


# Maps -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1 << 20, 10])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_of_every_kernel(at_once, masked, dtype, monkeypatch):
    """Fewer queries than keys; rows sum to one; a key that is not there, and an item without keys, get nothing."""
    from foldkernels.kernels.attention import torch as kernel

    monkeypatch.setattr(kernel, "_MAPS_AT_ONCE", at_once)
    torch.manual_seed(0)
    q, k = torch.randn(3, 5, 4, 8).to(dtype), torch.randn(3, 11, 4, 8).to(dtype)
    mask = torch.rand(3, 11) < 0.6 if masked else None
    if mask is not None:
        mask[1] = False
    maps = {}
    for name in ("torch", "reference"):
        with required("attention", name) as config, record_kernels() as ran:
            maps[name] = attention_maps(q, k, mask, config=config)
        assert ran == [f"attention: {name}"]
        with required("attention", "reference") as config:
            truth = attention_maps(q.double(), k.double(), mask, config=config)
        assert maps[name].dtype is torch.float32 and maps[name].shape == (3, 4, 5, 11)
        torch.testing.assert_close(maps[name].double(), truth, atol=1e-6, rtol=1e-5)
    sums = truth.sum(-1)
    torch.testing.assert_close(
        sums, torch.ones_like(sums) if mask is None else mask.any(1)[:, None, None].expand(sums.shape).double()
    )
    if mask is not None:
        assert not maps["torch"].transpose(1, 3)[~mask].any()


def test_gradients_of_maps():
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 3, 6).double(), torch.randn(2, 7, 3, 6).double()
    mask = torch.arange(7) < torch.tensor([7, 0])[:, None]
    found = []
    for name in ("torch", "reference"):
        with torch.enable_grad(), required("attention", name) as config:
            leaves = [x.clone().requires_grad_() for x in (q, k)]
            attention_maps(*leaves, mask, config=config).square().sum().backward()
        found.append([x.grad for x in leaves])
    for ours, true in zip(*found, strict=True):
        torch.testing.assert_close(ours, true)
        assert true[0].any() and not true[1].any()


def test_maps_of_a_kernel_that_has_none():
    """The error names both ways out."""
    with pytest.raises(KernelUnavailable) as refusal, required("attention", "flash_attn") as config:
        attention_maps(torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 8), config=config)
    for words in ("flash-attn never forms them", "kernel: {attention: torch}", "only_single: true"):
        assert words in str(refusal.value)


# Types, graphs, copies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "reach"), [(torch.float64, 2e-5), (torch.bfloat16, 0.5)])
def test_other_floating_types(dtype, reach):
    tokens = batch(18, 7, masks=False)
    model = tiny()
    truth = model(tokens, repr_layers=[3])
    found = model.to(dtype)(tokens, repr_layers=[3], return_contacts=True)
    assert found["logits"].dtype is found["representations"][3].dtype is dtype
    assert (found["logits"] - truth["logits"]).abs().max() < reach
    assert found["attentions"].dtype is (torch.float64 if dtype is torch.float64 else torch.float32)


def test_angles_stay_out_of_16_bits():
    model = drawn()
    angles = model.layers[0].self_attn.rot_emb.inv_freq.clone()
    model.half()
    assert model.layers[0].fc1.weight.dtype is torch.float16
    assert torch.equal(model.layers[0].self_attn.rot_emb.inv_freq, angles)
    assert model.double().layers[0].self_attn.rot_emb.inv_freq.dtype is torch.float64


def test_it_is_one_graph():
    torch._dynamo.reset()
    model, tokens = tiny(), batch(12, 5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found, expected = compiled(tokens, repr_layers=[0, 3]), model(tokens, repr_layers=[0, 3])
    torch.testing.assert_close(found["logits"], expected["logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found["representations"][3], expected["representations"][3], atol=1e-5, rtol=0)
    torch._dynamo.reset()


def test_copies_and_pickles():
    model, tokens = tiny(), batch(6)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens)["logits"], model(tokens)["logits"])
        assert other.lm_head.weight is other.embed_tokens.weight


def test_positions_may_be_given():
    """What counts is where tokens stand to one another."""
    model, tokens = drawn(), batch(9)
    last = [layer.x for layer in model.layers_of(tokens, None)][-1]
    there = torch.arange(11)[None]
    same = [layer.x for layer in model.layers_of(tokens, None, there + 500)][-1]
    other = [layer.x for layer in model.layers_of(tokens, None, there * 2)][-1]
    torch.testing.assert_close(same, last, atol=1e-4, rtol=0)
    assert (other - last).abs().max() > 1e-2


# Files ----------------------------------------------------------------------------------------------------------------


def huggingface() -> dict[str, Tensor]:
    golden = load_file(GOLDENS / "cogeneration" / "esm_combiner_single0.safetensors")
    return {n.removeprefix("w_esm_hf."): w for n, w in golden.items() if n.startswith("w_esm_hf.")}


def test_every_kind_of_file_gives_the_same_model(tmp_path):
    model = tiny()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "state.pt")
    save_file(state, tmp_path / "state.safetensors")
    torch.save({f"encoder.sentence_encoder.{n}": w for n, w in state.items()}, tmp_path / "prefixed.pt")
    for source in (state, tmp_path / "state.pt", str(tmp_path / "state.safetensors"), tmp_path / "prefixed.pt"):
        other, alphabet = esm.load(source)
        assert not other.training and alphabet is other.alphabet
        assert all(torch.equal(x, state[name]) for name, x in other.state_dict().items())
    without, _ = esm.load(TINY, contacts=False)
    assert without.contact_head is None
    with pytest.raises(ValueError, match="without its contact head"):
        without(batch(5), return_contacts=True)


def test_a_file_in_half_precision_gives_float32():
    """As fair-esm reads the largest of its checkpoints, whose weights are float16."""
    half, _ = esm.load({name: tensor.half() for name, tensor in tiny().state_dict().items()})
    assert {p.dtype for p in half.parameters()} == {torch.float32}


def test_hugging_face_s_files(tmp_path):
    """Its names, its folder, and what newer ones leave out."""
    weights = huggingface()
    tokens = batch(9)
    model, _ = esm.load(weights)
    assert (model.num_layers, model.embed_dim, model.attention_heads) == (2, 24, 3)
    newer = {name: w for name, w in weights.items() if "inv_freq" not in name and name != "lm_head.decoder.weight"}
    folder = tmp_path / "esm2"
    folder.mkdir()
    save_file(newer, folder / "model.safetensors")
    (folder / "config.json").write_text('{"num_attention_heads": 3, "token_dropout": true}')
    other, _ = esm.load(folder)
    torch.testing.assert_close(other(tokens)["logits"], model(tokens)["logits"])
    with pytest.raises(BadInput, match=r"esm\.pooler\.weight is no weight"):
        esm.from_huggingface({"esm.pooler.weight": torch.zeros(1)})


def _namespace(**settings: Any) -> argparse.Namespace:
    return argparse.Namespace(**settings)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"args": _namespace(arch="roberta_large"), "model": {"x": torch.zeros(1)}}, "found ESM-1b or ESM-1v"),
        ({"args": _namespace(arch="msa_transformer"), "model": {"x": torch.zeros(1)}}, "found MSA Transformer"),
        ({"embed_positions.weight": torch.zeros(2, 2)}, "with learned positions"),
        ({"layers.0.row_self_attention.layer.k_proj.weight": torch.zeros(2, 2)}, "the MSA Transformer"),
        ({"model": {}}, "there are no weights"),
        ({"weight": torch.zeros(2)}, "with embed_tokens.weight; found weight"),
        ([1, 2], "found list"),
        ({"a": 3}, "no tensors: a"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_no_esm2(content, said, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(BadInput, match=said) as refusal:
        esm.load(tmp_path / "model.pt")
    assert "expected" in str(refusal.value) and "model.pt" in str(refusal.value)


def test_missing_files(tmp_path):
    with pytest.raises(BadInput, match="no such file") as refusal:
        esm.load(tmp_path / "esm2_t6_8M_UR50D.pt")
    assert "https://dl.fbaipublicfiles.com/fair-esm/regression/esm2_t6_8M_UR50D-contact-regression.pt" in str(
        refusal.value
    )
    (tmp_path / "alone.pt").write_bytes(TINY.read_bytes())
    with pytest.raises(BadInput, match=r"alone-contact-regression\.pt: there is no such file"):
        esm.load(tmp_path / "alone.pt")
    assert esm.load(tmp_path / "alone.pt", contacts=False)[0].num_layers == 3
    with pytest.raises(BadInput, match="found neither"):
        esm.load(tmp_path)


def test_weights_that_do_not_fit():
    state = dict(tiny().state_dict())
    for change, said in (
        ({"layers.1.fc1.bias": None}, "layers.1.fc1.bias"),
        ({"layers.1.fc9.bias": torch.zeros(3)}, "layers.1.fc9.bias"),
        ({"layers.1.fc1.bias": torch.zeros(3)}, "layers.1.fc1.bias"),
        ({"lm_head.weight": torch.zeros(33, 48)}, "differs from embed_tokens"),
        ({"layers.2.self_attn.rot_emb.inv_freq": torch.ones(6)}, "inv_freq differ"),
        ({"layers.7.fc1.bias": torch.zeros(3)}, "layers numbered from 0"),
    ):
        other: dict[str, Any] = {**state, **change}
        with pytest.raises(BadInput, match=said):
            esm.load({name: weight for name, weight in other.items() if weight is not None})


def test_a_pickle_that_asks_for_code(tmp_path):
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (exec, ("raise SystemExit",))

    torch.save({"cfg": {"model": Evil()}, "model": {}}, tmp_path / "evil.pt")
    with pytest.raises(BadInput, match="nothing in it was run"):
        esm.load(tmp_path / "evil.pt")


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([("x", "MKJA")], "sequence 'x': 'J' at position 3"),
        ([("x", "mka")], "'m' at position 1"),
        ([("x", "MK"), ("y", "")], "sequence 'y' is empty"),
        ([("x", "  ")], "sequence 'x' is empty"),
        ([], "a batch without sequences"),
    ],
)
def test_sequences_that_are_none(given, said):
    with pytest.raises(ValueError, match=said) as refusal:
        Alphabet().get_batch_converter()(given)
    assert "expected" in str(refusal.value)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m(torch.zeros(3, dtype=torch.int64)), r"expected whole numbers \[batch, n\]"),
        (lambda m: m(torch.zeros(2, 3)), "whole numbers"),
        (lambda m: m(torch.full((1, 3), 33)), "tokens hold 33; this alphabet's numbers are 0 to 32"),
        (lambda m: m(batch(4) - 1), "tokens hold -1"),
        (lambda m: m(batch(4), repr_layers=[4]), "no layer 4; this model has 0 to 3"),
        (lambda m: m(batch(4), repr_layers=[-1]), "no layer -1"),
        (lambda m: ESM2(2, 30, 4), "pairs of channels"),
    ],
)
def test_calls_that_are_wrong(call, said):
    with pytest.raises(ValueError, match=said):
        call(tiny())
