"""Checkpoints are found, read, and written as safetensors; whatever is wrong with one is said in one message."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from safetensors.torch import save_file

from foldkernels.compat.multiflow.checkpoint import files
from foldkernels.compat.multiflow.config.sections import interpolant_section, model_section
from foldkernels.errors import BadInput

pytestmark = pytest.mark.quick

GOLDENS = Path(__file__).parents[2] / "goldens" / "multiflow"
FOLDERS = ("small", "small_chain")


def same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return sorted(left) == sorted(right) and all(
        torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in left
    )


@pytest.mark.parametrize("folder", FOLDERS)
def test_reads_a_lightning_folder(folder: str) -> None:
    read = files.read_checkpoint(GOLDENS / folder)
    assert read.source == GOLDENS / folder / "last.ckpt"
    # Our own golden file: torch's full unpickler may read it here.
    expected = torch.load(read.source, weights_only=False)["state_dict"]
    assert all(key.startswith("model.") for key in expected)
    assert same_weights(read.state_dict, {key.removeprefix("model."): value for key, value in expected.items()})
    assert not any(key.startswith("model.") for key in read.state_dict)
    assert isinstance(read.config, DictConfig)
    unresolved = OmegaConf.to_container(read.config)
    assert isinstance(unresolved, dict)
    assert unresolved["interpolant"]["self_condition"] == "${model.edge_features.self_condition}"
    assert interpolant_section(read.config).self_condition is True
    with pytest.raises(AttributeError):
        read.source = Path()  # type: ignore[misc]


@pytest.mark.parametrize("folder", FOLDERS)
def test_config_inside_the_checkpoint_equals_the_one_beside_it(tmp_path: Path, folder: str) -> None:
    shutil.copy(GOLDENS / folder / "last.ckpt", tmp_path / "some-name.ckpt")
    alone = files.read_checkpoint(tmp_path / "some-name.ckpt")
    beside = files.read_checkpoint(str(GOLDENS / folder))
    assert alone.config == beside.config
    assert model_section(alone.config) == model_section(beside.config)
    assert OmegaConf.is_interpolation(alone.config.model.ipa, "c_s"), "kept as it stood"
    # config.yaml beside it wins.
    (tmp_path / "config.yaml").write_text("model: {node_embed_size: 8}\n")
    assert files.read_checkpoint(tmp_path / "some-name.ckpt").config == {"model": {"node_embed_size": 8}}


def test_config_with_missing_values_and_unknown_resolvers(tmp_path: Path) -> None:
    shutil.copy(GOLDENS / "small" / "last.ckpt", tmp_path)
    text = (GOLDENS / "small" / "config_extra_keys.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text + "\nwhen: ${now:%Y}\nwho: ???\nhow: ${not_a_resolver:1}\n")
    read = files.read_checkpoint(tmp_path)
    assert model_section(read.config).ipa.c_s == 64
    files.write_safetensors(read, tmp_path / "out")
    again = OmegaConf.to_container(files.read_checkpoint(tmp_path / "out").config)
    assert isinstance(again, dict)
    assert (again["when"], again["who"], again["how"]) == ("${now:%Y}", "???", "${not_a_resolver:1}")


@pytest.mark.parametrize("folder", FOLDERS)
def test_written_safetensors_read_back(tmp_path: Path, folder: str) -> None:
    read = files.read_checkpoint(GOLDENS / folder)
    path = files.write_safetensors(read, tmp_path / "new" / "folder")
    assert sorted(os.listdir(path.parent)) == ["config.yaml", "model.safetensors"]
    assert path.stat().st_mode == (path.parent / "config.yaml").stat().st_mode
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "written_by": "foldkernels", "source": f"{folder}/last.ckpt"}
    for place in (path, path.parent):
        again = files.read_checkpoint(place)
        assert again.source == path
        assert again.config == read.config and same_weights(again.state_dict, read.state_dict)


def test_shared_and_strided_tensors_are_written(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    weights = {"a": base, "b": base, "t": base.t(), "row": base[1], "half": base.bfloat16()}
    read = files.Checkpoint(weights, OmegaConf.create({"model": {}}), Path("x.ckpt"))
    files.write_safetensors(read, tmp_path)
    assert same_weights(files.read_checkpoint(tmp_path).state_dict, weights)


def test_existing_files_are_kept_unless_told(tmp_path: Path) -> None:
    small, chain = (files.read_checkpoint(GOLDENS / folder) for folder in FOLDERS)
    files.write_safetensors(small, tmp_path)
    with pytest.raises(BadInput, match=r"already holds model\.safetensors and config\.yaml"):
        files.write_safetensors(chain, tmp_path)
    assert same_weights(files.read_checkpoint(tmp_path).state_dict, small.state_dict)
    files.write_safetensors(chain, tmp_path, overwrite=True)
    assert same_weights(files.read_checkpoint(tmp_path).state_dict, chain.state_dict)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"already holds config\.yaml"):
        files.write_safetensors(small, tmp_path)
    files.write_safetensors(chain, tmp_path)  # its own config: this conversion was killed between the two files
    assert same_weights(files.read_checkpoint(tmp_path).state_dict, chain.state_dict)


@pytest.mark.parametrize("failing", ["model.safetensors", "config.yaml"])
def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    small, chain = (files.read_checkpoint(GOLDENS / folder) for folder in FOLDERS)
    files.write_safetensors(small, tmp_path)
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if target.name == failing:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(BadInput, match="No space left"):
        files.write_safetensors(chain, tmp_path, overwrite=True)
    with pytest.raises(BadInput, match="No space left"):
        files.write_safetensors(chain, tmp_path / "new")
    monkeypatch.undo()
    again = files.read_checkpoint(tmp_path)
    assert same_weights(again.state_dict, small.state_dict) and again.config == small.config
    (tmp_path / "new").rmdir()  # empty: nothing half-written
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "model.safetensors"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    read = files.read_checkpoint(GOLDENS / "small")
    with pytest.raises(BadInput, match="cannot write"):
        files.write_safetensors(read, tmp_path / "file" / "folder")


# ---- bad input


def refused(path: Path, words: str) -> BadInput:
    with pytest.raises(BadInput, match=words) as caught:
        files.read_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert len(message.splitlines()) < 20 and "Traceback" not in message
    return caught.value


def lightning(path: Path, content: Any) -> Path:
    path.mkdir(exist_ok=True)
    shutil.copy(GOLDENS / "small" / "config.yaml", path)
    torch.save(content, path / "last.ckpt")
    return path


def test_nothing_there(tmp_path: Path) -> None:
    assert refused(tmp_path / "nowhere", "no such file or folder").hint
    assert refused(tmp_path, r"no last\.ckpt and no model\.safetensors").hint
    (tmp_path / "epoch=3.ckpt").write_bytes(b"x")
    hint = refused(tmp_path, r"It holds epoch=3\.ckpt").hint
    assert hint is not None and str(tmp_path / "epoch=3.ckpt") in hint


def test_lightning_wins_over_safetensors(tmp_path: Path) -> None:
    """A folder that training still writes to: last.ckpt is what it wrote last."""
    files.write_safetensors(files.read_checkpoint(GOLDENS / "small"), tmp_path)
    shutil.copy(GOLDENS / "small" / "last.ckpt", tmp_path)
    assert files.read_checkpoint(tmp_path).source.name == "last.ckpt"


@pytest.mark.parametrize("name", ["last.ckpt", "model.safetensors"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    files.write_safetensors(files.read_checkpoint(GOLDENS / "small"), tmp_path)
    shutil.copy(GOLDENS / "small" / "last.ckpt", tmp_path)
    whole = (tmp_path / name).read_bytes()
    for other in {"last.ckpt", "model.safetensors"} - {name}:
        (tmp_path / other).unlink()
    for content in (b"", whole[:5], whole[: len(whole) // 2], whole[:-1], b"<html>not found</html>", os.urandom(4096)):
        (tmp_path / name).write_bytes(content)
        error = refused(tmp_path, "empty|cut short|damaged|web page|not a checkpoint|plain pickle")
        assert str(tmp_path / name) in error.message and error.hint


def test_hostile_checkpoint(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'canary'}",)

    lightning(tmp_path, {"state_dict": {"model.a": torch.ones(1)}, "callbacks": Attack()})
    refused(tmp_path, r"refused, nothing in it was run.*(posix|nt)\.system")
    assert not (tmp_path / "canary").exists()
    pickle.loads(pickle.dumps(Attack()))
    assert (tmp_path / "canary").exists(), "the attack is real"


def test_strange_contents(tmp_path: Path) -> None:
    tensor = torch.ones(1)
    refused(lightning(tmp_path, {"state_dict": {}}), "state_dict is empty")
    refused(lightning(tmp_path, {}), "empty")
    refused(lightning(tmp_path, [tensor]), "not a checkpoint")
    refused(lightning(tmp_path, tensor), "not a checkpoint")
    refused(lightning(tmp_path, {"state_dict": [tensor]}), "not a table of tensors")
    refused(lightning(tmp_path, {"state_dict": {"a": 1, "b": tensor}}), "no tensors: a")
    refused(lightning(tmp_path, {"epoch": 1, "weights": {"a": tensor}}), "no tensors: epoch, weights")
    refused(lightning(tmp_path, {"state_dict": {"a": tensor, "model.a": tensor}}), "both a and model.a")
    # A bare state_dict is fine, and names of other modules stay.
    read = files.read_checkpoint(lightning(tmp_path, {"model.a": torch.nn.Parameter(tensor), "other.b": tensor}))
    assert sorted(read.state_dict) == ["a", "other.b"] and not read.state_dict["a"].requires_grad
    assert type(read.state_dict["a"]) is torch.Tensor


def test_no_config(tmp_path: Path) -> None:
    for content in (
        {"state_dict": {"model.a": torch.ones(1)}},
        {"state_dict": {"model.a": torch.ones(1)}, "hyper_parameters": {}},
        {"state_dict": {"model.a": torch.ones(1)}, "hyper_parameters": [1]},
        {"state_dict": {"model.a": torch.ones(1)}, "hyper_parameters": {"cfg": None}},
    ):
        lightning(tmp_path, content)
        (tmp_path / "config.yaml").unlink()
        assert refused(tmp_path, "no config.yaml beside it, and no config saved in it").hint
    lightning(tmp_path, {"state_dict": {"model.a": torch.ones(1)}, "hyper_parameters": {"cfg": {"a": "${broken"}}})
    (tmp_path / "config.yaml").unlink()
    refused(tmp_path, "config saved in it cannot be used")
    (tmp_path / "last.ckpt").unlink()
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert refused(tmp_path, "no config.yaml beside it").hint


def test_unreadable_config(tmp_path: Path) -> None:
    shutil.copy(GOLDENS / "small" / "last.ckpt", tmp_path)
    (tmp_path / "config.yaml").write_text("model:\n  a: [1\n  b: 2\n")
    error = refused(tmp_path, "not valid YAML in line")
    assert str(tmp_path / "config.yaml") in error.message


# ---- the report


def test_mismatch_report_fits_on_a_screen() -> None:
    assert files.mismatch_report([], [], []) == ""
    report = files.mismatch_report(
        [f"missing.{n}" for n in range(713)],
        ["one.weight"],
        [("trunk.linear.weight", torch.Size([8, 4]), (8, 5))],
    )
    lines = report.splitlines()
    assert len(lines) < 30 and all(len(line) < 120 for line in lines)
    assert "lacks (713)" in lines[0] and "missing.7" in report and "missing.8" not in report
    assert "  ... and 705 more" in lines
    assert "lacks (1):\n  one.weight" in report
    assert "trunk.linear.weight: model (8, 4), checkpoint (8, 5)" in report


def test_bad_input_prints_its_fix_and_pickles() -> None:
    error = BadInput("a.ckpt: broken.", "mend it.")
    assert str(error) == "a.ckpt: broken.\n  Fix: mend it." and str(BadInput("x")) == "x"
    again = pickle.loads(pickle.dumps(error))
    assert (again.message, again.hint) == (error.message, error.hint)


def test_imports_are_light() -> None:
    code = (
        "import sys; from foldkernels.compat.multiflow.checkpoint import files\n"
        "from foldkernels.compat.checkpoints import unpickler\n"
        "heavy = {'torch', 'omegaconf', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    import foldkernels

    roots = [str(Path(place).parent) for place in foldkernels.__path__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*roots, *sys.path])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
