"""Multiflow's model computes what the original computes, takes what it takes, and says what is wrong with the rest."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import roma
import torch
from omegaconf import OmegaConf
from torch import Tensor

from foldkernels.compat.multiflow.checkpoint.files import Checkpoint, read_checkpoint, write_safetensors
from foldkernels.compat.multiflow.checkpoint.loading import build, load
from foldkernels.compat.multiflow.model import FlowModel
from foldkernels.errors import BadInput
from foldkernels.kernels.registry import record_kernels
from foldkernels.modules.edge_features import EdgeFeatureNet
from foldkernels.modules.invariant_point_attention import InvariantPointAttention
from foldkernels.modules.rigid import Rigid

from ...support.goldens import MULTIFLOW, TOLERANCE, batch_of, model_of, part, read, small_model

pytestmark = pytest.mark.quick

KERNELS = ("reference", "torch")
CASES = sorted(str(path.relative_to(MULTIFLOW)) for path in MULTIFLOW.glob("*/case_*.safetensors"))
#: On one core the published size takes seconds for these.
LONG = "full/case_L64.safetensors"


def valid_error(found: Tensor, expected: Tensor, batch: dict[str, Tensor]) -> float:
    """The largest difference on rows that take part."""
    there = batch["res_mask"] > 0.5
    assert found.shape == expected.shape and there.any()
    return float((found.double() - expected.double())[there].abs().max())


# --------------------------------------------------------------------------------------------------------- the goldens


@pytest.fixture(scope="module")
def models() -> Callable[[str, str], FlowModel]:
    """Models by size and kernel, made once."""
    made: dict[tuple[str, str], FlowModel] = {}

    def get(size: str, kernel: str) -> FlowModel:
        if (size, kernel) not in made:
            made[size, kernel] = model_of(size, kernel)
        return made[size, kernel]

    return get


def test_every_golden_case_is_here() -> None:
    """Cases are found by their names: one that is missing would be missed by nobody."""
    lengths = {"small": (17, 40, 64), "small_chain": (17, 40), "full": (17, 40, 64)}
    assert set(CASES) == {f"{size}/case_L{n}.safetensors" for size, ns in lengths.items() for n in ns}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c == LONG else c for c in CASES])
def test_the_original_is_reproduced(case: str, kernel: str, models: Callable[[str, str], FlowModel]) -> None:
    """On valid rows, with and without gradients, against the original's float32 and against float64."""
    golden, _ = read(case)
    batch, model = part(golden, "in."), models(Path(case).parent.name, kernel)
    assert not model.training
    with record_kernels() as ran, torch.no_grad():
        out = model(batch)
    assert {name.partition(": ")[2] for name in ran} == {kernel} and len({*ran}) >= 4
    slow = model(batch)
    assert slow["pred_trans"].requires_grad
    for name, tolerance in TOLERANCE.items():
        expected = golden[f"out.{name}"]
        truth = expected.double() + golden[f"d64.{name}"].double()
        errors = {
            "float32": valid_error(out[name], expected, batch),
            "float64": valid_error(out[name], truth, batch),
            "with gradients": valid_error(slow[name].detach(), golden[f"out_slow.{name}"], batch),
        }
        assert max(errors.values()) <= tolerance, (name, errors)
    there = batch["res_mask"] > 0.5
    assert torch.equal(out["pred_aatypes"][there], golden["out.pred_aatypes"][there])


@pytest.mark.parametrize("kernel", KERNELS)
def test_float64_is_the_truth(kernel: str) -> None:
    """The model in float64 gives the original's float64 outputs to float32's rounding of the sinusoids and inputs."""
    golden, _ = read("small/case_L17.safetensors")
    batch = part(golden, "in.")
    out = model_of("small", kernel).double()(batch)
    for name, tolerance in TOLERANCE.items():
        assert out[name].dtype is torch.float64
        truth = golden[f"out.{name}"].double() + golden[f"d64.{name}"].double()
        assert valid_error(out[name].detach(), truth, batch) <= tolerance


def test_a_config_with_unknown_keys_is_taken(tmp_path: Path) -> None:
    """The published config has keys that the public code lacks."""
    (tmp_path / "last.ckpt").symlink_to(MULTIFLOW / "small" / "last.ckpt")
    (tmp_path / "config.yaml").write_text((MULTIFLOW / "small" / "config_extra_keys.yaml").read_text())
    assert "sequence_net" in (tmp_path / "config.yaml").read_text()
    batch = batch_of("small/case_L17.safetensors")
    model = load(tmp_path, "torch")
    assert "twisting" in model.config.interpolant
    with torch.no_grad():
        found, expected = model(batch), model_of("small")(batch)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("size", ["small", "small_chain"])
def test_converted_checkpoints_are_bit_equal(tmp_path: Path, size: str) -> None:
    """Written as safetensors and loaded again, the model gives the same bits."""
    write_safetensors(read_checkpoint(MULTIFLOW / size), tmp_path / "converted")
    batch = batch_of(f"{size}/case_L17.safetensors")
    found, expected = load(tmp_path / "converted", "torch"), model_of(size)
    assert found.config == expected.config
    with torch.no_grad():
        ours, theirs = found(batch), expected(batch)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ------------------------------------------------------------------------------------------------- what it can be given


class Rotations:
    """OpenFold's `Rotation`, as far as anyone asks it."""

    def __init__(self, rotmats: Tensor) -> None:
        self.rotmats = rotmats

    def get_rot_mats(self) -> Tensor:
        return self.rotmats


class OpenFoldRigid:
    """OpenFold's `Rigid`, likewise."""

    def __init__(self, rotmats: Tensor, trans: Tensor) -> None:
        self.rots, self.trans = Rotations(rotmats), trans

    def get_rots(self) -> Rotations:
        return self.rots

    def get_trans(self) -> Tensor:
        return self.trans


SIZES = {"c_s": 64, "c_z": 32, "c_hidden": 16, "no_heads": 4, "no_qk_points": 4, "no_v_points": 6}


@pytest.mark.parametrize(
    "conf",
    [
        SimpleNamespace(**SIZES, dropout=0.0, seq_tfmr_num_heads=4),
        OmegaConf.create({**SIZES, "dropout": 0.0}),
    ],
    ids=["attributes", "omegaconf"],
)
def test_the_originals_config_object_and_rigids_are_taken(conf: Any) -> None:
    """`InvariantPointAttention(conf)` and OpenFold's rigid object give what sizes by name and `Rigid` give."""
    golden, _ = read("ipa/ipa_small_L17.safetensors")
    inputs, weights = part(golden, "in."), part(golden, "w.")
    outs = []
    for layer, frames in (
        (InvariantPointAttention(conf), OpenFoldRigid(inputs["rotmats"], inputs["trans"])),
        (InvariantPointAttention(**SIZES), Rigid(inputs["rotmats"], inputs["trans"])),
    ):
        layer.load_state_dict(weights, strict=True)
        outs.append(layer(inputs["s"], inputs["z"], frames, inputs["mask"]))
    assert torch.equal(outs[0], outs[1])


def test_what_ipa_cannot_be_made_of_or_given_is_said() -> None:
    """A size that is missing is named; frames that are none are refused."""
    with pytest.raises(TypeError, match="no_heads="):
        InvariantPointAttention(SimpleNamespace(c_s=8, c_z=4, c_hidden=2, no_qk_points=1, no_v_points=1))
    layer = InvariantPointAttention(c_s=8, c_z=4, c_hidden=2, no_heads=1, no_qk_points=1, no_v_points=1)
    with pytest.raises(TypeError, match=r"get_rots\(\).*not tuple"):
        layer(torch.zeros(1, 3, 8), torch.zeros(1, 3, 3, 4), (1, 2), torch.ones(1, 3))


def test_ipa_without_down_z_is_openfolds() -> None:
    """OpenFold's layer has no `down_z`, attends z whole, and its last layer is wider."""
    layer = InvariantPointAttention(**SIZES, down_z=False)
    assert not any(name.startswith("down_z") for name in layer.state_dict())
    assert layer.linear_out.in_features == 4 * (32 + 16 + 4 * 6)
    # With down_z folded into the last layer, Multiflow's weights give Multiflow's output.
    golden, _ = read("ipa/ipa_small_L17.safetensors")
    inputs, weights = part(golden, "in."), part(golden, "w.")
    down, bias = weights.pop("down_z.weight"), weights.pop("down_z.bias")
    last = weights["linear_out.weight"]
    cut = last.shape[1] - 4 * down.shape[0]
    per_head = last[:, cut:].unflatten(1, (4, -1))
    weights["linear_out.weight"] = torch.cat([last[:, :cut], (per_head @ down).flatten(1)], 1)
    weights["linear_out.bias"] = weights["linear_out.bias"] + (per_head @ bias).sum(1)
    layer.load_state_dict(weights, strict=True)
    out = layer(inputs["s"], inputs["z"], Rigid(inputs["rotmats"], inputs["trans"]), inputs["mask"])
    there = inputs["mask"] > 0.5
    assert float((out.detach() - golden["out"])[there].abs().max()) <= 1e-5


def test_leading_axes_of_ipa_are_free() -> None:
    """OpenFold calls it with any number of batch axes."""
    golden, _ = read("ipa/ipa_small_L17.safetensors")
    inputs = part(golden, "in.")
    layer = InvariantPointAttention(**SIZES)
    layer.load_state_dict(part(golden, "w."))

    def run(change: Callable[[Tensor], Tensor]) -> Tensor:
        s, z, rotmats, trans, mask, pairs = (
            change(inputs[name]) for name in ("s", "z", "rotmats", "trans", "mask", "attention_mask")
        )
        out: Tensor = layer(s, z, Rigid(rotmats, trans), mask, pairs)
        return out

    expected = run(lambda x: x)
    assert torch.equal(run(lambda x: x[:, None])[:, 0], expected)
    torch.testing.assert_close(run(lambda x: x[0]), expected[0], atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("diffuse_mask", lambda x: x[:, :-1], ["diffuse_mask has shape (2, 16)", "must be (2, 17)"]),
        ("res_mask", lambda x: x[0], ["res_mask has shape (17,)", "[batch, residues]"]),
        ("res_mask", lambda x: x[:, :5], ["with res_mask (2, 5)"]),
        ("so3_t", lambda x: x[:, 0], ["so3_t has shape (2,)", "must be (2, 1)"]),
        ("trans_t", lambda x: x[..., :2], ["trans_t has shape (2, 17, 2)", "must be (2, 17, 3)"]),
        ("rotmats_t", lambda x: x[..., 0], ["rotmats_t has shape (2, 17, 3)"]),
        ("aatypes_sc", lambda x: x[..., :20], ["aatypes_sc has shape (2, 17, 20)", "must be (2, 17, 21)"]),
        ("trans_sc", None, ["lacks trans_sc", "a batch holds"]),
    ],
)
def test_batches_that_do_not_fit_are_named(
    name: str, change: Callable[[Tensor], Tensor] | None, words: list[str]
) -> None:
    """Wrong shapes and missing entries: one sentence that names the tensor, and what it must be."""
    batch = batch_of("small/case_L17.safetensors")
    if change is None:
        del batch[name]
    else:
        batch[name] = change(batch[name])
    with pytest.raises(BadInput) as caught:
        model_of("small")(batch)
    assert all(word in str(caught.value) for word in words), caught.value
    assert len(str(caught.value).splitlines()) <= 3


def test_there_is_no_longest_length() -> None:
    """`max_num_res` bounds nothing, as in the original: positions are sinusoids, and no table ends."""
    batch = batch_of("small/case_L17.safetensors")
    short, long = (small_model(model__node_features__max_num_res=size) for size in (16, 17))
    long.load_state_dict(short.state_dict())
    expected, found = long(batch), short(batch)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_that_do_not_fit_are_listed_on_one_screen() -> None:
    """Missing, unexpected and misshapen weights are all named, or counted; and nothing is loaded in part."""
    checkpoint = read_checkpoint(MULTIFLOW / "small")
    state = dict(checkpoint.state_dict)
    del state["trunk.ipa_0.head_weights"]
    state["trunk.ipa_9.head_weights"] = torch.zeros(4)
    state["trunk.ipa_1.head_weights"] = torch.zeros(5)
    with pytest.raises(BadInput) as caught:
        build(Checkpoint(state, checkpoint.config, checkpoint.source))
    text = str(caught.value)
    for words in (
        "lacks (1):\n  trunk.ipa_0.head_weights",
        "the model lacks (1):\n  trunk.ipa_9.head_weights",
        "trunk.ipa_1.head_weights: model (4,), checkpoint (5,)",
        "last.ckpt",
        "Fix: ",
    ):
        assert words in text, text
    # Another model's config: everything differs, and it still fits on a screen.
    other = read_checkpoint(MULTIFLOW / "small_chain")
    with pytest.raises(BadInput) as caught:
        build(Checkpoint(checkpoint.state_dict, other.config, other.source))
    text = str(caught.value)
    assert len(text.splitlines()) < 40 and "and " in text and " more" in text


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"kernel": "flahs"}, BadInput, "did you mean 'flash'"),
        ({"kernel": "${no.such.key}"}, BadInput, "kernel"),
        ({"kernel": {"attention": "${no.such.key}"}}, BadInput, "kernel"),
        ({"foldkernels": {"activation_checkpoint": True}}, BadInput, "activation_checkpointing"),
        ({"foldkernels": {"activation_checkpointing": "perhaps"}}, BadInput, "foldkernels.activation_checkpointing"),
        ({"foldkernels": "fast"}, BadInput, "foldkernels"),
    ],
)
def test_our_sections_are_checked(
    changes: dict[str, Any], error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kernel:` and `foldkernels:` in a checkpoint's config: what cannot be read is an error, never left out."""
    monkeypatch.delenv("FOLDKERNELS_KERNEL", raising=False)
    with pytest.raises(error, match=words):
        small_model(None, **changes)


def test_the_files_kernel_section_is_resolved_from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """`kernel: ${profile.word}` means the word that stands there; the call wins over it."""
    monkeypatch.delenv("FOLDKERNELS_KERNEL", raising=False)
    batch = batch_of("small/case_L17.safetensors")
    for call, expected in ((None, "reference"), ("torch", "torch")):
        model = small_model(call, profile__word="reference", kernel="${profile.word}")
        assert model.kernels is not None
        assert model.kernels.resolved.sources["preset"] == ("file" if call is None else "call")
        with record_kernels() as ran, torch.no_grad():
            model(batch)
        assert {name.partition(": ")[2] for name in ran} == {expected}


def test_a_device_that_is_not_there_is_said() -> None:
    """No traceback of torch's for a device that it does not have."""
    with pytest.raises(BadInput, match="device 'gpu' cannot be used"):
        load(MULTIFLOW / "small", device="gpu")


# ------------------------------------------------------------------------------------------------- masks and symmetries


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", ["small/case_L17.safetensors", "small_chain/case_L40.safetensors"])
def test_masked_residues_influence_nobody(case: str, kernel: str) -> None:
    """Whatever stands in rows that take no part, valid rows come out bit for bit the same."""
    batch, model = batch_of(case), model_of(Path(case).parent.name, kernel)
    gone = batch["res_mask"] < 0.5
    assert gone.any()
    other = {name: value.clone() for name, value in batch.items()}
    generator = torch.Generator().manual_seed(1)
    count = int(gone.sum())
    other["trans_t"][gone] = 1e3 * torch.randn(count, 3, generator=generator)
    other["trans_sc"][gone] = 50 * torch.randn(count, 3, generator=generator)
    other["rotmats_t"][gone] = torch.randn(count, 3, 3, generator=generator)
    other["aatypes_t"][gone] = 3
    other["aatypes_sc"][gone] = 10 * torch.randn(count, 21, generator=generator)
    other["diffuse_mask"][gone] = 1 - other["diffuse_mask"][gone]
    other["res_idx"][gone] = 777
    other["chain_idx"][gone] = 9
    with torch.no_grad():
        before, after = model(batch), model(other)
    for name in before:
        error = valid_error(after[name], before[name], batch)
        # The points' centre is a sum over all rows with weights of zero: the same numbers, so the same bits.
        assert error == 0.0, (name, error)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_mask_keeps_its_gradient_clean(kernel: str) -> None:
    """NaN in the gradient is the usual end of a masked softmax: none, and none for the inputs of masked rows."""
    batch, model = batch_of("small/case_L17.safetensors"), model_of("small", kernel)
    batch["trans_t"].requires_grad_()
    out = model(batch)
    there = batch["res_mask"] > 0.5
    (out["pred_trans"][there].sum() + out["pred_logits"][there].sum()).backward()
    gradient = batch["trans_t"].grad
    assert gradient is not None and gradient.isfinite().all()
    assert (gradient[~there] == 0).all() and (gradient[there] != 0).any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kernel", KERNELS)
def test_batch_items_are_independent(kernel: str) -> None:
    """An item alone gives what it gives beside others; to rounding, since products of other shapes add up otherwise."""
    batch, model = batch_of("small/case_L40.safetensors"), model_of("small", kernel)
    with torch.no_grad():
        together = model(batch)
        for item in range(2):
            alone = model({name: value[item : item + 1] for name, value in batch.items()})
            one = {name: value[item : item + 1] for name, value in batch.items()}
            for name, tolerance in TOLERANCE.items():
                assert valid_error(alone[name], together[name][item : item + 1], one) <= tolerance / 2
        # The other item may be anything.
        other = {name: value.clone() for name, value in batch.items()}
        other["trans_t"][1] += 5.0
        other["aatypes_t"][1] = 0
        other["so3_t"][1] = 0.9
        changed = model(other)
    for name in TOLERANCE:
        assert torch.equal(changed[name][0], together[name][0])
        assert not torch.equal(changed[name][1], together[name][1])


def test_fully_masked_items_stay_finite() -> None:
    """An item of padding alone, as a ragged last batch may hold, spoils nothing."""
    batch, model = batch_of("small/case_L17.safetensors"), model_of("small")
    with torch.no_grad():
        before = model(batch)
        batch["res_mask"][1] = 0
        after = model(batch)
    assert all(value.isfinite().all() for value in after.values())
    assert all(torch.equal(after[name][0], before[name][0]) for name in TOLERANCE)


def moved(rotmats: Tensor, trans: Tensor, turn: Tensor, shift: Tensor) -> Rigid:
    """Frames in Angstrom, turned and shifted in float64, as float32 in nanometres."""
    rotated = turn @ rotmats.double()
    return Rigid(rotated.float()[None], (0.1 * trans.double() @ turn.T + shift).float()[None])


@pytest.mark.parametrize("seed", [0, 1])
def test_moving_everything_by_100_nm_moves_nothing(seed: int) -> None:
    """On a real protein IPA's and the trunk's outputs move by at most 1e-4, and twice what the reference's move."""
    frames, _ = read("geometry/frames_1odh.safetensors")
    n = frames["trans"].shape[0]
    generator = torch.Generator().manual_seed(seed)
    turn = roma.unitquat_to_rotmat(
        torch.nn.functional.normalize(torch.randn(4, dtype=torch.float64, generator=generator), dim=0)
    )
    shift = torch.randn(3, dtype=torch.float64, generator=generator)
    shift = 100 * shift / shift.norm()
    here = moved(frames["rotmats"], frames["trans"], torch.eye(3, dtype=torch.float64), torch.zeros(3))
    there = moved(frames["rotmats"], frames["trans"], turn, shift)
    assert float((there.trans - here.trans).norm(dim=-1).min()) > 90
    mask = torch.rand(1, n, generator=generator) > 0.1
    pairs = mask[:, :, None] & mask[:, None]
    nodes = torch.randn(1, n, 64, generator=generator) * mask[..., None]
    z = torch.randn(1, n, n, 32, generator=generator) * pairs[..., None]
    movement: dict[str, dict[str, float]] = {}
    for kernel in KERNELS:
        trunk = model_of("small", kernel).trunk
        with torch.no_grad():
            layer = [trunk["ipa_1"](nodes, z, frame, mask)[mask] for frame in (here, there)]
            whole = [trunk(nodes, z, frame, mask, mask.float())[0][mask] for frame in (here, there)]
        movement[kernel] = {
            "layer": float((layer[0] - layer[1]).abs().max()),
            "trunk": float((whole[0] - whole[1]).abs().max()),
        }
        assert float(whole[0].abs().max()) > 1  # there is something to move
    for what in ("layer", "trunk"):
        assert movement["torch"][what] <= min(1e-4, 2 * movement["reference"][what]), movement
        assert movement["reference"][what] <= 1e-4, movement


def test_rotating_the_input_rotates_the_output() -> None:
    """The whole model: frames turn with their input, residue types stay."""
    batch, model = batch_of("small/case_L40.safetensors"), model_of("small")
    turn = roma.unitquat_to_rotmat(torch.nn.functional.normalize(torch.tensor([0.3, -0.5, 0.7, 0.2]), dim=0))
    turned = dict(batch)
    turned["trans_t"], turned["trans_sc"] = batch["trans_t"] @ turn.T, batch["trans_sc"] @ turn.T
    turned["rotmats_t"] = turn @ batch["rotmats_t"]
    with torch.no_grad():
        before, after = model(batch), model(turned)
    # A distance on the edge of a distogram's bin may fall to its other side: looser than rounding alone.
    assert valid_error(after["pred_trans"], before["pred_trans"] @ turn.T, batch) <= 2e-3
    assert valid_error(after["pred_rotmats"], turn @ before["pred_rotmats"], batch) <= 1e-4
    assert valid_error(after["pred_logits"], before["pred_logits"], batch) <= 1e-3


# ------------------------------------------------------------------------------------------------------------- modules


def test_the_edge_feature_nets_pair_mask_is_the_originals() -> None:
    """`p_mask`, the originals' argument, gives on its pairs what `mask` gives, and zeros elsewhere."""
    golden, _ = read("small/case_L17.safetensors")
    batch, model = part(golden, "in."), model_of("small")
    net: EdgeFeatureNet = model.edge_feature_net
    mask = batch["res_mask"]
    pairs = mask[:, :, None] * mask[:, None]
    s = torch.randn(*mask.shape, 64, generator=torch.Generator().manual_seed(0))
    arguments = (s, batch["trans_t"], batch["trans_sc"])
    rest = (batch["diffuse_mask"], batch["chain_idx"])
    by_pairs, by_mask = net(*arguments, pairs, *rest), net(*arguments, None, *rest, mask=mask)
    torch.testing.assert_close(by_pairs, by_mask, atol=1e-6, rtol=0)
    assert (by_pairs[pairs == 0] == 0).all() and (by_pairs[pairs == 1] != 0).any()


def test_a_model_without_residue_types_gives_its_input_back() -> None:
    """`aatype_pred: false`: no head, and the given types as logits."""
    batch = batch_of("small/case_L17.safetensors")
    checkpoint = read_checkpoint(MULTIFLOW / "small")
    config = checkpoint.config.copy()
    config.model.aatype_pred = False
    state = {name: value for name, value in checkpoint.state_dict.items() if "aatype_pred_net" not in name}
    out = build(Checkpoint(state, config, checkpoint.source), "torch")(batch)
    assert torch.equal(out["pred_aatypes"], batch["aatypes_t"])
    assert torch.equal(out["pred_logits"].argmax(-1), batch["aatypes_t"])


def test_the_mask_token_is_never_predicted() -> None:
    """Token 20 is read, not written, however large its logit."""
    batch, model = batch_of("small/case_L17.safetensors"), model_of("small")
    with torch.no_grad():
        model.aatype_pred_net[4].bias[20] = 1e6
        out = model(batch)
    assert (out["pred_logits"].argmax(-1) == 20).all() and (out["pred_aatypes"] < 20).all()


def test_a_process_of_its_own_loads_and_runs(tmp_path: Path) -> None:
    """In a fresh interpreter, warnings being errors: no warning, and the golden's residue types."""
    code = f"""
        import sys, warnings
        warnings.simplefilter("error")
        import torch
        from safetensors.torch import load_file
        from foldkernels.compat import multiflow
        golden = load_file({str(MULTIFLOW / "small" / "case_L17.safetensors")!r})
        model = multiflow.load({str(MULTIFLOW / "small")!r}, kernel="flash")
        out = model({{n.removeprefix("in."): t for n, t in golden.items() if n.startswith("in.")}})
        there = golden["in.res_mask"] > 0.5
        assert torch.equal(out["pred_aatypes"][there], golden["out.pred_aatypes"][there])
        assert not {{"flash_attn", "matplotlib"}} & set(sys.modules), sorted(sys.modules)
    """
    lines = [line.removeprefix("        ") for line in code.splitlines()]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
