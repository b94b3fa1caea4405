"""Double attention, IPA and attention trunks compute what cogeneration's compute, with its weights, loaded strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from foldkernels.configs.options import BlocksConfig, IPABlockConfig, TrunkConfig
from foldkernels.kernels.registry import record_kernels
from foldkernels.kernels.registry.binding import bind
from foldkernels.modules.attention_trunk import AttentionPairBiasTrunk, AttentionTrunk
from foldkernels.modules.double_attention import DoubleAttentionPairTrunk
from foldkernels.modules.ipa_trunk import IPATrunk
from foldkernels.modules.rigid import Rigid

from ..support.goldens import part

pytestmark = pytest.mark.quick

FOLDER = Path(__file__).resolve().parents[1] / "goldens" / "cogeneration"
KERNELS = ("reference", "torch")
FILM = ("film0_ln0", "film0_ln1", "film1_ln0", "film1_ln1")
TRUNKS = {
    "double": "double_attention_pair",
    "ipa": "ipa",
    "pairformer": "pairformer",
    "pairformer_no_seq": "pairformer_no_seq",
}
TOLERANCE = 1e-5

# The sizes that every attention trunk's file was made with; its metadata holds them as text.
BLOCKS = BlocksConfig.model_validate(
    {
        "pairformer": {"num_heads": 4, "pairwise_head_width": 8, "pairwise_num_heads": 2, "dropout": 0.1},
        "double_attention_pair": {"bottleneck_scale": 4, "use_film": True, "time_mlp_hidden_dim": 12},
        "ipa": {
            "c_hidden": 8,
            "no_heads": 4,
            "no_qk_points": 4,
            "no_v_points": 6,
            "seq_tfmr_num_heads": 2,
            "seq_tfmr_num_layers": 1,
            "dropout": 0.0,  # theirs is 0.1, in training
            "transformer_dropout": 0.1,
        },
    }
)


def read(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = FOLDER / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        return load_file(path), json.loads(file.metadata()["cfg"])


def ready(module: nn.Module, golden: dict[str, Tensor], kernel: str) -> nn.Module:
    module.load_state_dict(part(golden, "w."), strict=True)
    bind(module, kernel)
    return module.eval()


def frames(golden: dict[str, Tensor]) -> Rigid:
    return Rigid(golden["in.rots"], golden["in.trans_nm"])


def error(golden: dict[str, Tensor], name: str, found: Tensor) -> float:
    """The largest difference from float32 and from float64, on residues or pairs that take part."""
    expected = golden[f"out.{name}"]
    pairs = name == "edge_embed"
    there = golden["in.edge_mask" if pairs else "in.node_mask"] > 0.5
    assert found.shape == expected.shape and there.any() and not there.all()
    truth = expected.double() + golden[f"d64.{name}"].double()
    return max(float((found.double() - wanted)[there].abs().max()) for wanted in (expected.double(), truth))


def test_every_golden_file_is_tested() -> None:
    # The combiner has tests of its own, in test_esm_features.py.
    names = {path.stem for path in FOLDER.glob("*.safetensors") if not path.stem.startswith("esm_combiner")}
    expected = {f"double_attention_trunk_{film}" for film in FILM} | {f"attention_trunk_{word}" for word in TRUNKS}
    assert names == expected | {"attention_pair_bias_trunk", "ipa_trunk_bb_torsions7", "ipa_trunk_nobb_finaledge"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", FILM)
def test_double_attention_trunk(name: str, grad: bool, overwrite: bool) -> None:
    """With and without time and final LayerNorm; the pass without gradients goes block by block, in place if it may."""
    golden, cfg = read(f"double_attention_trunk_{name}")
    trunk = DoubleAttentionPairTrunk(
        cfg["edge_embed_size"],
        cfg["num_layers"],
        cfg["bottleneck_scale"],
        cfg["use_film"],
        cfg["time_mlp_hidden_dim"],
        final_layer_norm=cfg["final_layer_norm"],
    )
    ready(trunk, golden, "torch")
    given = golden["in.edge_embed"].clone()
    with torch.set_grad_enabled(grad):
        out = trunk(given, golden["in.edge_mask"], golden["in.r3_t"], overwrite_z=overwrite)
    assert out.requires_grad is grad
    assert error(golden, "edge_embed", out.detach()) <= TOLERANCE
    assert torch.equal(given, golden["in.edge_embed"]) is (grad or not overwrite)


def test_double_attention_in_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut after every 13 pairs, which no row's end coincides with, the result is the same."""
    golden, _ = read("double_attention_trunk_film1_ln1")
    trunk = DoubleAttentionPairTrunk(16, 3, 4, True, 12, final_layer_norm=True)
    ready(trunk, golden, "torch")
    monkeypatch.setattr("foldkernels.modules.double_attention.pairs_per_block", lambda z: 26)
    with torch.no_grad():
        out = trunk(golden["in.edge_embed"], golden["in.edge_mask"], golden["in.r3_t"])
    assert error(golden, "edge_embed", out) <= TOLERANCE


@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_pair_bias_trunk(kernel: str) -> None:
    golden, cfg = read("attention_pair_bias_trunk")
    trunk = AttentionPairBiasTrunk(
        cfg["node_dim"], cfg["edge_dim"], cfg["num_layers"], cfg["num_heads"], residual=False, final_layer_norm=True
    )
    ready(trunk, golden, kernel)
    with torch.no_grad(), record_kernels() as ran:
        out = trunk(golden["in.node_embed"], golden["in.edge_embed"], golden["in.node_mask"])
    assert {*ran} == {f"attention_pair_bias: {kernel}"}
    assert error(golden, "node_embed", out) <= TOLERANCE


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["bb_torsions7", "nobb_finaledge"])
def test_ipa_trunk(name: str, kernel: str) -> None:
    """As a folding trunk with torsion angles, and as an enrichment that updates the last block's pairs."""
    golden, cfg = read(f"ipa_trunk_{name}")
    folding = name == "bb_torsions7"
    sizes = {key: value for key, value in cfg.items() if key in IPABlockConfig.model_fields}
    ipa = type("Sizes", (), {**sizes, "dropout": 0.0, "c_s": cfg["c_s"], "c_z": cfg["c_z"]})
    trunk = IPATrunk(
        ipa,
        cfg["num_blocks"],
        backbone_update=folding,
        final_edge_update=not folding,
        num_torsions=7 if folding else 0,
    )
    ready(trunk, golden, kernel)
    with torch.no_grad(), record_kernels() as ran:
        nodes, z, moved, torsions = trunk(
            golden["in.node_embed"],
            golden["in.edge_embed"],
            golden["in.node_mask"],
            frames(golden),
            golden["in.diffuse_mask"],
        )
    assert {word.partition(": ")[2] for word in ran} == {kernel}
    out = {"node_embed": nodes, "edge_embed": z, "rotmats": moved.get_rot_mats(), "trans_nm": moved.get_trans()}
    if folding:
        assert torsions is not None and (golden["in.diffuse_mask"] == 0).any()
        out["torsions"] = torsions
    else:
        assert torsions is None and torch.equal(moved.get_trans(), golden["in.trans_nm"])
    assert out.keys() == part(golden, "out.").keys()
    errors = {key: error(golden, key, value) for key, value in out.items()}
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("word", TRUNKS)
def test_attention_trunk(word: str, kernel: str) -> None:
    """Every block, merged with the initial embeddings and normalised before and after."""
    golden, cfg = read(f"attention_trunk_{word}")
    flags = {f"{place}_{what}": True for place in ("pre", "post") for what in ("node_layer_norm", "edge_layer_norm")}
    config = TrunkConfig(num_layers=1, pre_add_init_embed=True, post_add_init_embed=True, **flags)
    assert cfg["trunk"].count("=True") == 6 and "num_layers=1," in cfg["trunk"]
    trunk = AttentionTrunk(TRUNKS[word], 32, 16, config, BLOCKS)
    ready(trunk, golden, kernel)
    inputs = {name: value.clone() for name, value in part(golden, "in.").items()}
    with torch.no_grad(), record_kernels() as ran:
        nodes, z = trunk(
            inputs["node_embed"],
            inputs["edge_embed"],
            inputs["node_mask"],
            init_node_embed=inputs["init_node_embed"],
            init_edge_embed=inputs["init_edge_embed"],
            rigid=frames(golden),
            r3_t=inputs["r3_t"],
        )
    # Double attention has no kernels to choose from.
    assert {name.partition(": ")[2] for name in ran} == ({kernel} if word != "double" else set())
    errors = {"node_embed": error(golden, "node_embed", nodes), "edge_embed": error(golden, "edge_embed", z)}
    assert max(errors.values()) <= TOLERANCE, errors
    assert all(torch.equal(value, golden[f"in.{name}"]) for name, value in inputs.items())


@pytest.mark.parametrize("word", TRUNKS)
def test_a_wrong_weight_is_seen(word: str) -> None:
    """These tests can fail: a twentieth of noise on a matrix is found. (A scale alone may vanish in a LayerNorm.)"""
    golden, _ = read(f"attention_trunk_{word}")
    config = TrunkConfig(
        num_layers=1,
        **{name: True for name in TrunkConfig.model_fields if name.startswith(("pre_", "post_"))},
    )
    trunk = AttentionTrunk(TRUNKS[word], 32, 16, config, BLOCKS)
    ready(trunk, golden, "torch")
    matrices = [(name, p) for name, p in trunk.named_parameters() if p.ndim == 2 and name.startswith("trunk.")]
    for name, parameter in matrices[:: max(1, len(matrices) // 6)]:
        with torch.no_grad():
            kept = parameter.clone()
            parameter.add_(0.05 * kept.std() * torch.randn(kept.shape, generator=torch.Generator().manual_seed(0)))
            nodes, z = trunk(
                *(golden[f"in.{key}"] for key in ("node_embed", "edge_embed", "node_mask")),
                init_node_embed=golden["in.init_node_embed"],
                init_edge_embed=golden["in.init_edge_embed"],
                rigid=frames(golden),
                r3_t=golden["in.r3_t"],
            )
            parameter.copy_(kept)
        worst = max(error(golden, "node_embed", nodes), error(golden, "edge_embed", z))
        assert worst > 5 * TOLERANCE, (name, worst)
