"""Multiflow's sections: resolved from the root, checked, with the published config's values as defaults."""

from __future__ import annotations

import argparse
import dataclasses
import pickle
import types
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError

from foldkernels.compat.multiflow.config import sections
from foldkernels.compat.multiflow.config.sections import (
    InterpolantConfig,
    as_interpolant_config,
    as_model_config,
    interpolant_section,
    model_section,
    read_config,
)
from foldkernels.errors import BadInput

GOLDENS = Path(__file__).parents[2] / "goldens" / "multiflow"


def test_defaults_are_the_published_config() -> None:
    config = read_config(GOLDENS / "full" / "config.yaml")
    model, interpolant = model_section(config), interpolant_section(config)
    assert model == as_model_config({}) and interpolant == InterpolantConfig() == as_interpolant_config({})
    # Not only equal to each other: every value in the file is in the object, and no other is.
    assert model.model_dump() == OmegaConf.to_container(config.model, resolve=True)
    assert interpolant.model_dump() == OmegaConf.to_container(config.interpolant, resolve=True)
    assert (model.ipa.c_s, model.ipa.c_z, model.node_features.c_s, model.edge_features.c_p) == (256, 128, 256, 128)
    assert (model.ipa.no_heads, model.ipa.no_qk_points, model.ipa.no_v_points) == (8, 8, 12)
    assert (interpolant.rots.exp_rate, interpolant.aatypes.noise, interpolant.trans.rog.cutoff) == (10, 20.0, 5.0)


@pytest.mark.parametrize("name", ["small/config.yaml", "small/config_extra_keys.yaml", "small_chain/config.yaml"])
def test_sections_follow_the_file(name: str) -> None:
    config = read_config(GOLDENS / name)
    model = model_section(config)
    assert model.model_dump() == OmegaConf.to_container(config.model, resolve=True)
    assert model != as_model_config({})
    assert model.node_features.c_s == model.edge_features.c_s == model.ipa.c_s == config.model.node_embed_size
    assert pickle.loads(pickle.dumps(model)) == model
    for change in (lambda: setattr(model, "symmetric", True), lambda: setattr(model.ipa, "c_s", 1)):
        with pytest.raises(ValidationError, match="frozen"):
            change()


def test_unknown_keys_are_kept() -> None:
    config = read_config(GOLDENS / "small" / "config_extra_keys.yaml")
    assert model_section(config).sequence_net == {"use": False, "num_layers": 2}  # type: ignore[attr-defined]
    assert interpolant_section(config).twisting["use"] is False  # type: ignore[attr-defined]


def test_self_condition_resolves_through_the_root() -> None:
    config = read_config(GOLDENS / "small" / "config.yaml")
    config.model.edge_features.self_condition = False
    assert interpolant_section(config).self_condition is False
    # A node taken from the root still knows its root.
    assert interpolant_section(config.interpolant).self_condition is False
    assert as_interpolant_config(config.interpolant).self_condition is False
    alone = OmegaConf.create(OmegaConf.to_container(config.interpolant))
    with pytest.raises(BadInput, match="does not resolve"):
        as_interpolant_config(alone)
    with pytest.raises(BadInput, match=r"interpolant\.self_condition is the unresolved reference"):
        as_interpolant_config(OmegaConf.to_container(config.interpolant))
    # The whole file as a plain mapping has a root too.
    plain = OmegaConf.to_container(config)
    assert interpolant_section(plain).self_condition is False
    assert isinstance(plain, dict) and model_section(plain).ipa.c_s == 64


def test_any_attribute_object() -> None:
    @dataclasses.dataclass
    class Rotations:
        sample_schedule: str = "linear"
        exp_rate: int = 3

    class Slots:
        __slots__ = ("min_t", "rots")
        min_t: float
        rots: Rotations

    slots = Slots()
    slots.min_t, slots.rots = 0.5, Rotations()
    expected = InterpolantConfig.model_validate(
        {"min_t": 0.5, "rots": {"sample_schedule": "linear", "exp_rate": 3}},
    )
    for section in (
        slots,
        types.SimpleNamespace(min_t=0.5, rots=Rotations(), unknown=object()),
        argparse.Namespace(min_t=0.5, rots={"sample_schedule": "linear", "exp_rate": 3}),
        {"min_t": 0.5, "rots": OmegaConf.create({"sample_schedule": "linear", "exp_rate": 3})},
        OmegaConf.create({"min_t": 0.5, "rots": {"sample_schedule": "linear", "exp_rate": 3}}),
        expected,
    ):
        found = interpolant_section(section)
        assert found == expected and found.rots.train_schedule == "linear"
    assert as_model_config(types.SimpleNamespace(node_embed_size=64)).ipa.c_s == 64
    for nothing in (None, 3, "masking", [1]):
        with pytest.raises(BadInput, match="should be a section"):
            as_interpolant_config(nothing)


def wrong(section: dict[str, Any], *words: str) -> str:
    with pytest.raises(BadInput) as caught:
        model_section(OmegaConf.create({"model": section}), Path("dir/config.yaml"))
    message = str(caught.value)
    assert all(word in message for word in ("dir/config.yaml: model", *words)), message
    assert len(message.splitlines()) < 20 and "pydantic" not in message
    return message


def test_wrong_values_are_named() -> None:
    wrong({"ipa": {"no_heads": "8"}}, "model.ipa.no_heads: should be a valid integer (it is '8')")
    wrong({"ipa": {"no_heads": True}}, "model.ipa.no_heads", "(it is True)")
    wrong({"ipa": {"no_heads": 8.5}}, "model.ipa.no_heads", "8.5")
    wrong({"ipa": {"no_heads": None}}, "model.ipa.no_heads", "None")
    wrong({"ipa": {"num_blocks": 0}}, "model.ipa.num_blocks: should be greater than 0 (it is 0)")
    wrong({"node_features": {"use_mlp": "maybe"}}, "model.node_features.use_mlp: should be a valid boolean")
    wrong({"transformer_dropout": 1.5}, "model.transformer_dropout", "less than 1")
    wrong({"ipa": 3}, "model.ipa should be a section")
    wrong({"ipa": None}, "model.ipa should be a section")
    wrong({"ipa": {"c_s": 128}}, "ipa.c_s is 128, but node_embed_size is 256")
    wrong({"edge_features": {"c_p": 64}}, "edge_features.c_p is 64, but edge_embed_size is 128")
    wrong({"ipa": {"seq_tfmr_num_heads": 7}}, "must divide node_embed_size (256)")
    wrong({"node_embed_size": "${nothing.here}"}, "does not resolve")
    wrong({"ipa": {"c_hidden": "???"}}, "does not resolve")
    wrong({"ipa": {"c_hidden": "${now:%Y}"}}, "does not resolve")
    many = wrong({"ipa": dict.fromkeys(sections.IPAConfig.model_fields, "x"), "symmetric": 1, "aatype_pred": 2,
                  "edge_features": {"num_bins": "x", "feat_dim": "x", "relpos_k": "x"}}, "more")  # fmt: skip
    assert "... and 3 more" in many
    with pytest.raises(BadInput, match=r"interpolant\.aatypes\.interpolant_type: should be 'masking' or 'uniform'"):
        as_interpolant_config({"aatypes": {"interpolant_type": "absorbing"}})


def test_missing_sections() -> None:
    for config in ({"data": {"a": 1}}, {"data": 1, "experiment": 2}):
        with pytest.raises(BadInput, match=r"c\.yaml: the config has no section `model:` \(it has: data"):
            model_section(OmegaConf.create(config), Path("c.yaml"))
        with pytest.raises(BadInput, match="no section `interpolant:`"):
            interpolant_section(config)
    with pytest.raises(BadInput, match="no section `model:`"):
        model_section({})
    with pytest.raises(BadInput, match="does not resolve"):
        model_section(OmegaConf.create({"model": "${elsewhere}"}))
    with pytest.raises(BadInput, match="should be a section"):
        model_section(OmegaConf.create({"model": "word"}))
    # A section that is itself a reference.
    assert model_section(OmegaConf.create({"model": "${other}", "other": {"node_embed_size": 64}})).ipa.c_s == 64


def test_numbers_as_yaml_writes_them(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "interpolant: {min_t: 1e-2, rots: {exp_rate: 10}, sampling: {num_timesteps: 1_0}}"
    )
    section = interpolant_section(read_config(tmp_path / "config.yaml"))
    assert (section.min_t, section.rots.exp_rate, section.sampling.num_timesteps) == (0.01, 10, 10)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model:\n  a: [1\n  b: 2\n", "not valid YAML in line"),
        ("a: b: c", "not valid YAML in line 1"),
        ("\ta: 1", "not valid YAML in line 1"),
        ("a: \x01", "not valid YAML"),
        ("", "no config in it"),
        ("# nothing\n", "no config in it"),
        ("[1, 2]", "no config in it"),
        ("word", "no config in it"),
        ("a: ${broken", "not a valid config"),
        ("a: !!python/object/apply:os.system [touch canary]", "not valid YAML"),
        ("a: &a [*a]", "contains itself"),
        ("a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)), "far too many"),
        ("[" * 1200, "not valid YAML|contains itself"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=words) as caught:
        read_config(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert not (tmp_path / "canary").exists()


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(BadInput, match="no such file"):
        read_config(path)
    with pytest.raises(BadInput, match="cannot be read"):
        read_config(tmp_path)
    path.write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(BadInput, match="not valid YAML"):
        read_config(path)
    path.write_text("a: " + "x" * (1 << 22))
    with pytest.raises(BadInput, match="too large"):
        read_config(path)
