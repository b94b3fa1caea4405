"""Configs that Hydra composes are refused without hydra-core, with the reason: nothing in them is passed over."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from foldkernels.compat.multiflow.config.sections import read_config
from foldkernels.compat.multiflow.training.run_config import read_run_config
from foldkernels.errors import BadInput


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("defaults: [base, _self_]\nmodel: {}\n", "`defaults:`"),
        ("hydra: {run: {dir: x}}\nmodel: {}\n", "`hydra:`"),
        ("defaults: [base]\nhydra: {}\n", "`defaults:` and `hydra:`"),
    ],
)
def test_without_hydra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, named: str) -> None:
    monkeypatch.setitem(sys.modules, "hydra", None)
    path = tmp_path / "run.yaml"
    path.write_text(text)
    for read in (read_config, read_run_config):
        with pytest.raises(BadInput, match=f"it has {named}, which Hydra composes from other files") as error:
            read(path)
        assert str(path) in str(error.value)
        assert "pip install 'foldkernels[hydra]'" in str(error.value.hint)


def test_a_config_without_a_file_and_another_ending(tmp_path: Path) -> None:
    for content in ({"defaults": ["base"], "model": {}}, OmegaConf.create({"hydra": {"run": {}}, "model": {}})):
        with pytest.raises(BadInput, match=r"which Hydra reads: what stands there would be passed over"):
            read_run_config(content)  # type: ignore[arg-type]
    path = tmp_path / "run.yml"
    path.write_text("defaults: [base]\n")
    with pytest.raises(BadInput, match=r"reads files whose names end in \.yaml only"):
        read_config(path)
