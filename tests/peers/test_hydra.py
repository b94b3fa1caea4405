"""Configs that Hydra composes, with the real hydra-core."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from foldkernels.compat.multiflow.checkpoint.files import read_checkpoint
from foldkernels.compat.multiflow.config.sections import model_section, read_config
from foldkernels.errors import BadInput

hydra = pytest.importorskip("hydra", reason="hydra-core is not installed (pip install '.[hydra]')")
SMALL = Path(__file__).parents[1] / "goldens" / "multiflow" / "small"


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "run.yaml"


def hydras_own(path: Path) -> Any:
    """What `hydra.main(version_base=None, config_path=..., config_name=...)` hands to its function."""
    with warnings.catch_warnings(), hydra.initialize_config_dir(config_dir=str(path.parent), version_base=None):
        warnings.simplefilter("ignore")
        return hydra.compose(config_name=path.stem)


BASE = "experiment: {seed: 77, optimizer: {lr: 5.0e-3}}\nmodel: {a: 1, b: 2}\n"
SMALL_MODEL = "a: 10\nc: ${experiment.seed}\n"
LARGE_MODEL = "a: 20\n"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "a file": (
        "defaults: [base, _self_]\nmodel: {b: 3}\n",
        {"experiment": {"seed": 77, "optimizer": {"lr": 0.005}}, "model": {"a": 1, "b": 3}},
    ),
    "itself first": (
        "defaults: [_self_, base]\nmodel: {b: 3}\n",
        {"model": {"a": 1, "b": 2}, "experiment": {"seed": 77, "optimizer": {"lr": 0.005}}},
    ),
    "a group": (
        "defaults: [{model: small}, _self_]\nexperiment: {seed: 5}\n",
        {"model": {"a": 10, "c": "${experiment.seed}"}, "experiment": {"seed": 5}},
    ),
    "an override": (
        "defaults: [nested, {override model: large}, _self_]\n",
        {"model": {"a": 20}, "experiment": {"seed": 1}},
    ),
    "an optional group": ("defaults: [base, {optional data: none}, _self_]\n", {"model": {"a": 1, "b": 2}}),
    "a package": ("defaults: [{model@other.place: small}, _self_]\n", {"other": {"place": {"a": 10}}}),
    "a global package": ("defaults: [{tune: one}, _self_]\n", {"experiment": {"seed": 9}}),
    "a group of a reference": (
        "defaults: [{model: large}, {twin: '${model}'}, _self_]\n",
        {"model": {"a": 20}, "twin": {"e": 5}},
    ),
    "Hydra's own settings": (
        "defaults: [base, _self_]\nhydra: {run: {dir: x}, job: {chdir: true}}\n",
        {"model": {"a": 1}},
    ),
    "Hydra's own settings alone": ("hydra: {run: {dir: x}}\nmodel: {a: 4}\n", {"model": {"a": 4}}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_config_is_what_hydra_composes(tmp_path: Path, case: str) -> None:
    text, expected = CASES[case]
    path = write(
        tmp_path,
        {
            "run.yaml": text,
            "base.yaml": BASE,
            "nested.yaml": "defaults: [{model: small}]\nexperiment: {seed: 1}\n",
            "model/small.yaml": SMALL_MODEL,
            "model/large.yaml": LARGE_MODEL,
            "twin/large.yaml": "e: 5\n",
            "tune/one.yaml": "# @package _global_\nexperiment: {seed: 9}\n",
        },
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = read_config(path)
    plain = OmegaConf.to_container(config)
    assert plain == OmegaConf.to_container(hydras_own(path))
    assert isinstance(plain, dict)
    assert "defaults" not in plain
    assert "hydra" not in plain
    for section, values in expected.items():
        for key, value in values.items():
            inner = plain[section][key]
            assert inner == value or inner == {**inner, **value}, (section, key)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults: [absent, _self_]\nmodel: {a: 1}\n", "absent"),
        ("defaults: [{model: absent}, _self_]\n", "absent"),
        ("defaults: [{override model: small}, _self_]\n", "model"),
        ("defaults: {model: small}\n", "defaults"),
        ("defaults: [broken, _self_]\n", "cannot compose it"),
        ("defaults: [{model: '???'}]\n", "model"),
        ("defaults: [{model: '${kind}'}]\n", "kind"),
    ],
)
def test_what_hydra_refuses_is_an_error_that_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = write(
        tmp_path,
        {"run.yaml": text, "base.yaml": BASE, "model/small.yaml": SMALL_MODEL, "broken.yaml": "a: [\n"},
    )
    with pytest.raises(BadInput, match=message) as error:
        read_config(path)
    assert str(path) in str(error.value)
    assert str(tmp_path) in str(error.value.hint)


def test_packages_are_not_searched(tmp_path: Path) -> None:
    path = write(tmp_path, {"run.yaml": "hydra: {searchpath: ['pkg://os']}\n"})
    with pytest.raises(BadInput, match="'pkg://os', and only folders"):
        read_config(path)
    write(tmp_path, {"run.yaml": f"defaults: [more]\nhydra: {{searchpath: ['file://{tmp_path}/other']}}\n"})
    write(tmp_path, {"other/more.yaml": "model: {a: 7}\n"})
    assert read_config(path) == {"model": {"a": 7}}


def test_inside_a_running_hydra(tmp_path: Path) -> None:
    path = write(tmp_path / "own", {"run.yaml": "defaults: [base, _self_]\n", "base.yaml": BASE})
    outer = write(tmp_path / "outer", {"run.yaml": "here: 1\n"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with hydra.initialize_config_dir(config_dir=str(outer.parent), version_base=None):
            assert read_config(path)["experiment"]["seed"] == 77
            assert hydra.compose(config_name="run") == {"here": 1}


def test_a_checkpoint_s_config(tmp_path: Path) -> None:
    shutil.copy(SMALL / "last.ckpt", tmp_path)
    whole = (SMALL / "config.yaml").read_text()
    write(
        tmp_path,
        {"config.yaml": "defaults: [whole, _self_]\nmodel: {transformer_dropout: 0.05}\n", "whole.yaml": whole},
    )
    read = read_checkpoint(tmp_path)
    assert model_section(read.config).transformer_dropout == 0.05
    assert model_section(read.config).ipa == model_section(read_config(SMALL / "config.yaml")).ipa
