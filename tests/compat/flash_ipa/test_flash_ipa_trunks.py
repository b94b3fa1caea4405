"""Models of others with FlashIPA's trunk: RNA-FrameFlow against the original, FoldFlow's layout."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from foldkernels.compat import flash_ipa, rna_frameflow
from foldkernels.errors import BadInput
from foldkernels.kernels.registry import record_kernels
from foldkernels.kernels.registry.binding import bind
from foldkernels.modules.factor_trunk import FactorTrunk
from foldkernels.modules.rigid import Rigid
from foldkernels.modules.trunk import Trunk

from ...support.goldens import part

#: A model with FlashIPA, and one from before there was `use_flashipa`.
CASES = ("flash_1d_bias", "dense")


def golden(case: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the original computes (commit 5f3efa1), float32, random weights; and its `model:` section."""
    path = Path(__file__).parents[2] / "goldens" / "rna_frameflow" / f"{case}.safetensors"
    with safe_open(path, "pt") as file:
        return load_file(path), json.loads(file.metadata()["cfg"])


@pytest.mark.parametrize("kernel", ["reference", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_rna_frameflow_is_the_original(case: str, kernel: str) -> None:
    expected, config = golden(case)
    model = rna_frameflow.FlowModel(config)
    model.load_state_dict(part(expected, "w."), strict=True)
    bind(model, kernel)
    batch = part(expected, "in.")
    with torch.no_grad(), record_kernels() as ran:
        out = model(batch)
    assert any(name.startswith("factorized") for name in ran) == (case == "flash_1d_bias")
    there = batch["res_mask"] > 0.5
    # Torsions are divided by their norm: the original's own are 2.3e-5 from float64's.
    for name, atol in (("pred_trans", 2e-5), ("pred_rotmats", 5e-6), ("pred_torsions", 8e-5)):
        error = (out[name] - expected[f"out.{name}"])[there].abs().max()
        assert float(error) <= atol, name


@pytest.mark.parametrize("case", CASES)
def test_a_lightning_checkpoint_loads(case: str, tmp_path: Path) -> None:
    """With its config beside it, as a file resolves it, and with the config that Lightning saved."""
    expected, section = golden(case)
    section["edge_features"]["c_s"] = "${model.node_embed_size}"
    if case != "dense":
        section["edge_features"]["max_len"] = "${data_cfg.filtering.max_len}"
    config = OmegaConf.create({"model": section, "data_cfg": {"filtering": {"max_len": 150}}})
    weights = {f"model.{name}": value for name, value in part(expected, "w.").items()}
    (tmp_path / "saved").mkdir()
    torch.save({"state_dict": weights, "hyper_parameters": {"cfg": config}}, tmp_path / "saved" / "last.ckpt")
    (tmp_path / "beside").mkdir()
    torch.save({"state_dict": weights}, tmp_path / "beside" / "last.ckpt")
    OmegaConf.save(config, tmp_path / "beside" / "config.yaml")
    batch = part(expected, "in.")
    there = batch["res_mask"] > 0.5
    for folder in ("saved", "beside"):
        model = rna_frameflow.load(tmp_path / folder, kernel="torch")
        assert not model.training and model.kernels is not None
        with torch.no_grad():
            out = model(batch)
        assert float((out["pred_trans"] - expected["out.pred_trans"])[there].abs().max()) <= 2e-5


def test_weights_of_a_dense_model_are_refused_by_a_factorised_one(tmp_path: Path) -> None:
    expected, _ = golden("dense")
    _, config = golden("flash_1d_bias")
    weights = {f"model.{name}": value for name, value in part(expected, "w.").items()}
    torch.save({"state_dict": weights}, tmp_path / "last.ckpt")
    OmegaConf.save(OmegaConf.create({"model": config}), tmp_path / "config.yaml")
    with pytest.raises(BadInput, match=r"do not fit(.|\n)*linear_t_distogram(.|\n)*use_flashipa"):
        rna_frameflow.load(tmp_path)


@pytest.mark.parametrize("c_hidden", [128, 256])
def test_the_published_sizes(c_hidden: int) -> None:
    """RNA-FrameFlow's config_flashipa.yaml, and FoldFlow's width of a head: every name, and the sizes that tell."""
    config: dict[str, Any] = {
        "use_flashipa": True,
        "mode": "flash_1d_bias",
        "edge_features": {"mode": "flash_1d_bias", "max_len": 150, "k": 20},
        "ipa": {"c_hidden": c_hidden, "no_heads": 8, "no_qk_points": 8, "no_v_points": 12},
    }
    with torch.device("meta"):
        state = rna_frameflow.FlowModel(config).state_dict()
    assert len(state) == 410
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes["trunk.ipa_5.linear_kv.weight"] == (2 * 8 * c_hidden, 256)
    assert shapes["trunk.ipa_0.linear_out.weight"] == (256, 8 * (32 + c_hidden + 4 * 12))
    assert shapes["trunk.edge_transition_4.edge_bias_linear.weight"] == (4 * 2 * 128, 128)
    assert shapes["trunk.seq_tfmr_5.layers.1.self_attn.in_proj_weight"] == (768, 256)
    assert shapes["edge_embedder.linear_t_distogram.weight"] == (2 * 2 * 22, 20 * (22 + 64))
    assert shapes["angle_pred_net.linear_out.weight"] == (16, 128)
    assert "trunk.edge_transition_5.final_layer.weight" not in shapes


def foldflow_layout(ipa: Any, c_skip: int) -> dict[str, Tensor]:
    """FoldFlow's trunk in its own names, from PyTorch's modules, with FlashIPA's layers where it has dense ones."""
    trunk = nn.ModuleDict()
    c = ipa.c_s
    for b in range(ipa.num_blocks):
        trunk[f"ipa_{b}"] = flash_ipa.InvariantPointAttention(ipa)
        trunk[f"ipa_ln_{b}"] = nn.LayerNorm(c)
        trunk[f"skip_embed_{b}"] = nn.Linear(c, c_skip)
        layer = nn.TransformerEncoderLayer(c + c_skip, ipa.seq_tfmr_num_heads, c + c_skip, 0.0, batch_first=True)
        trunk[f"seq_tfmr_{b}"] = nn.TransformerEncoder(layer, ipa.seq_tfmr_num_layers, enable_nested_tensor=False)
        trunk[f"post_tfmr_{b}"] = nn.Linear(c + c_skip, c)
        trunk[f"node_transition_{b}"] = flash_ipa.StructureModuleTransition(c)
        trunk[f"bb_update_{b}"] = flash_ipa.BackboneUpdate(c)
        if b < ipa.num_blocks - 1:
            trunk[f"edge_transition_{b}"] = flash_ipa.EdgeTransition(
                mode="1d", node_embed_size=c, edge_embed_in=ipa.c_z, edge_embed_out=ipa.c_z, z_factor_rank=2
            )
    for parameter in trunk.parameters():
        nn.init.normal_(parameter, std=0.3)
    return trunk.state_dict()


def test_foldflow_with_flash_ipa() -> None:
    """Its trunk reads the first single representation again in each block (`skip_embed`); a head is 256 wide."""
    torch.manual_seed(0)
    ipa = flash_ipa.IPAConfig(
        c_s=16, c_z=8, c_hidden=256, no_heads=2, seq_tfmr_num_heads=2, seq_tfmr_num_layers=1, num_blocks=2
    )
    trunk = FactorTrunk(ipa, ipa.c_z, c_skip=4)
    trunk.load_state_dict(foldflow_layout(ipa, 4), strict=True)
    nodes, factors = torch.randn(2, 7, 16), torch.randn(2, 2, 7, 2, 8)
    frames = Rigid(torch.eye(3).expand(2, 7, 3, 3), torch.randn(2, 7, 3))
    mask, moves = torch.ones(2, 7, dtype=torch.bool), torch.ones(2, 7)
    moves[:, :3] = 0
    with torch.no_grad():
        out, moved = trunk(nodes, *factors, frames, mask, moves)
        trunk["skip_embed_1"].weight.mul_(2.0)
        other, _ = trunk(nodes, *factors, frames, mask, moves)
    assert torch.equal(moved.trans[:, :3], frames.trans[:, :3]) and not torch.equal(moved.trans, frames.trans)
    assert float((out - other).abs().max()) > 1e-4


def test_each_mode_has_its_trunk() -> None:
    sizes = {"c_s": 16, "c_hidden": 4, "no_heads": 2, "num_blocks": 1}
    dense = SimpleNamespace(mode="orig_2d_bias", edge_embed_size=8, ipa=flash_ipa.IPAConfig(**sizes, c_z=8))
    none = SimpleNamespace(
        mode="orig_no_bias",
        edge_embed_size=8,
        ipa=flash_ipa.IPAConfig(**sizes, c_z=0, z_factor_rank=0, use_flash_attn=False),
    )
    from foldkernels.compat.flash_ipa.model import trunk_of

    assert type(trunk_of(dense)) is Trunk and type(trunk_of(none)) is FactorTrunk


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "flash"}, "mode is 'flash'"),
        ({"mode": "orig_2d_bias"}, "does not fit mode orig_2d_bias"),
        ({"node_embed_size": 64}, "edge_features.c_s is 32, but node_embed_size is 64"),
        ({"ipa": {"c_hidden": "8"}}, "model.ipa.c_hidden is '8'; it must be a whole number"),
        ({"ipa": 3}, "a section with settings was expected, not 3"),
    ],
)
def test_a_wrong_section(change: dict[str, Any], message: str) -> None:
    _, config = golden("flash_1d_bias")
    with pytest.raises(BadInput, match=message):
        rna_frameflow.FlowModel({**config, **change})


def test_a_wrong_batch() -> None:
    expected, config = golden("flash_1d_bias")
    model, batch = rna_frameflow.FlowModel(config), part(expected, "in.")
    with pytest.raises(BadInput, match="lacks t, rotmats_t"):
        model({name: value for name, value in batch.items() if name not in ("t", "rotmats_t")})
    with pytest.raises(BadInput, match="trans_t has shape"):
        model(batch | {"trans_t": batch["trans_t"][:, :5]})
    with pytest.raises(BadInput, match=r"t has shape \(2,\)"):
        model(batch | {"t": batch["t"][:, 0]})
