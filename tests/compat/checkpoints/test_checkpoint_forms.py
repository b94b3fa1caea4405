"""Checkpoints as training tools leave them: wrapped names, shards, folders, a model inside a fine-tuned one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from foldkernels.compat import boltz, esm
from foldkernels.compat.multiflow.checkpoint import files as checkpoint
from foldkernels.compat.multiflow.checkpoint.loading import load
from foldkernels.errors import BadInput

GOLDENS = Path(__file__).parents[2] / "goldens"
SMALL = GOLDENS / "multiflow" / "small"


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return {name: value.clone() for name, value in checkpoint.read_checkpoint(SMALL).state_dict.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(SMALL / "config.yaml", tmp_path)
    return tmp_path


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


WRAPPED = [
    "_orig_mod.",
    "model._orig_mod.",
    "_orig_mod.model.",
    "module.",
    "module.model.",
    "model.module.",
    "_forward_module.model.",
    "_forward_module.module.model._orig_mod.",
    "module._orig_mod.module.model.model.",
    "model._fsdp_wrapped_module.",
]


@pytest.mark.parametrize("prefix", WRAPPED)
def test_what_wrappers_put_before_names_comes_off(folder: Path, weights: dict[str, Tensor], prefix: str) -> None:
    torch.save({"state_dict": {prefix + name: value for name, value in weights.items()}}, folder / "last.ckpt")
    wrapper = next(part for part in prefix.split(".") if part not in ("model", ""))
    with pytest.warns(
        UserWarning, match=f"saved from a wrapped model; .*`{wrapper}.`.* the names of {len(weights)} weights"
    ):
        read = checkpoint.read_checkpoint(folder)
    assert same(read.state_dict, weights)


def test_what_wrappers_put_inside_names_comes_off(folder: Path, weights: dict[str, Tensor]) -> None:
    inside = {
        name.replace("trunk.", "trunk._orig_mod.").replace(".linear_q.", "._checkpoint_wrapped_module.linear_q."): value
        for name, value in weights.items()
    }
    averaged = {"n_averaged": torch.tensor(3)} | {f"module.{name}": value for name, value in inside.items()}
    torch.save({"state_dict": averaged}, folder / "last.ckpt")
    with pytest.warns(UserWarning, match="_orig_mod.*_checkpoint_wrapped_module"):
        model = load(folder)
    assert same(dict(model.state_dict()), weights)


def test_lightning_s_own_prefix_is_no_news(folder: Path, weights: dict[str, Tensor]) -> None:
    torch.save({"state_dict": {f"model.{name}": value for name, value in weights.items()}}, folder / "last.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(checkpoint.read_checkpoint(folder).state_dict, weights)


@pytest.mark.parametrize("key", ["model_state_dict", "module", "model"])
def test_tables_under_other_keys(folder: Path, weights: dict[str, Tensor], key: str) -> None:
    torch.save({key: weights, "epoch": 3, "optimizer": {"lr": 1.0}}, folder / "last.ckpt")
    assert same(checkpoint.read_checkpoint(folder).state_dict, weights)


FOREIGN: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str, str]] = {
    "FSDP": (lambda weights: {"model._flat_param": torch.zeros(9)}, "FSDP has flattened", "FullStateDictConfig"),
    "LoRA": (
        lambda weights: {**weights, "trunk.ipa_0.linear_q.lora_A.default.weight": torch.zeros(1)},
        "LoRA adapters",
        "merge_and_unload",
    ),
    "parametrized": (
        lambda weights: {"trunk.ipa_0.linear_q.parametrizations.weight.original0": torch.zeros(1)},
        "parametrized weights",
        "remove_parametrizations",
    ),
    "pruned": (lambda weights: {"trunk.ipa_0.linear_q.weight_orig": torch.zeros(1)}, "pruned weights", "prune.remove"),
    "twice": (
        lambda weights: {"model.trunk.x": torch.zeros(1), "module.trunk.x": torch.zeros(1)},
        "holds both model.trunk.x and module.trunk.x",
        "save one of them",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_weights_that_are_not_the_layers_own(folder: Path, weights: dict[str, Tensor], kind: str) -> None:
    change, message, hint = FOREIGN[kind]
    torch.save({"state_dict": change(weights)}, folder / "last.ckpt")
    with pytest.raises(BadInput, match=message) as error:
        checkpoint.read_checkpoint(folder)
    assert hint in str(error.value.hint)


def write_shards(folder: Path, weights: dict[str, Tensor], ending: str, index: bool = True) -> None:
    names = list(weights)
    parts = (names[: len(names) // 3], names[len(names) // 3 : -5], names[-5:])
    stem = "model" if ending == ".safetensors" else "pytorch_model"
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        file = f"{stem}-{number:05d}-of-00003{ending}"
        tensors = {name: weights[name] for name in part}
        if ending == ".safetensors":
            save_file(tensors, folder / file)
        else:
            torch.save(tensors, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if index:
        (folder / f"{stem}{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_shards(folder: Path, weights: dict[str, Tensor], ending: str, index: bool) -> None:
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    write_shards(folder, wrapped, ending, index)
    shard = sorted(folder.glob(f"*-00002-of-*{ending}"))[0]
    paths = [folder, shard, *folder.glob("*.index.json")]
    assert len(paths) == 2 + index
    for path in paths:
        with pytest.warns(UserWarning, match="module"):
            assert same(checkpoint.read_checkpoint(path).state_dict, weights)
    shard.unlink()
    with pytest.raises(BadInput, match=rf"1 of its 3 shards are missing: {shard.name}"):
        checkpoint.read_checkpoint(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "no JSON"),
        ("[]", "no table `weight_map`"),
        ('{"weight_map": {}}', "no table `weight_map`"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "no file in its own folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "no file in its own folder"),
        ('{"weight_map": {"a": 1}}', "no file in its own folder"),
        ('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}', "are in no shard, the first: a"),
    ],
)
def test_indexes_that_are_wrong(folder: Path, weights: dict[str, Tensor], index: str, message: str) -> None:
    save_file(weights, folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BadInput, match=message):
        checkpoint.read_checkpoint(folder)


def test_content_tells_the_format(folder: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, folder / "last.ckpt")
    assert same(checkpoint.read_checkpoint(folder).state_dict, weights)
    torch.save(weights, folder / "weights.safetensors")
    assert same(checkpoint.read_checkpoint(folder / "weights.safetensors").state_dict, weights)


def test_a_distributed_checkpoint_is_named_and_its_command_converts_it(
    folder: Path, weights: dict[str, Tensor]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no process group
        dcp.save({"state_dict": weights}, checkpoint_id=str(folder / "last.ckpt"))
    for path in (folder, folder / "last.ckpt"):
        with pytest.raises(BadInput, match=r"a folder of torch\.distributed\.checkpoint") as error:
            checkpoint.read_checkpoint(path)
        assert error.value.hint is not None
    command = error.value.hint.partition("pass that: python ")[2]
    subprocess.run([sys.executable, *command.split()], check=True, capture_output=True)
    assert same(checkpoint.read_checkpoint(command.split()[-1]).state_dict, weights)


def test_other_folders_are_named(folder: Path) -> None:
    deep = folder / "last.ckpt"
    (deep / "checkpoint").mkdir(parents=True)
    (deep / "zero_to_fp32.py").touch()
    (deep / "checkpoint" / "mp_rank_00_model_states.pt").touch()
    for path in (folder, deep, deep / "checkpoint"):
        with pytest.raises(BadInput, match="a checkpoint folder of DeepSpeed") as error:
            checkpoint.read_checkpoint(path)
        assert f"python {deep / 'zero_to_fp32.py'} {deep} " in str(error.value.hint)
    shutil.rmtree(deep)
    deep.mkdir()
    (deep / ".metadata").touch()
    (deep / "meta.pt").touch()
    with pytest.raises(BadInput, match="as Lightning writes it under FSDP") as error:
        checkpoint.read_checkpoint(folder)
    assert "pytorch_lightning.utilities.consolidate_checkpoint" in str(error.value.hint)
    shutil.rmtree(deep)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(BadInput, match="an adapter of peft"):
        checkpoint.read_checkpoint(folder)


def test_a_stage_three_file_is_named(folder: Path, weights: dict[str, Tensor]) -> None:
    torch.save({"module": dict.fromkeys(weights, torch.zeros(0))}, folder / "last.ckpt")
    with pytest.raises(BadInput, match=r"ZeRO stage 3\) has left the weights"):
        checkpoint.read_checkpoint(folder)


TINY = GOLDENS / "esm" / "esm2_t3_tiny.pt"


@pytest.fixture
def language_model() -> dict[str, Tensor]:
    model, _ = esm.load(TINY)
    return dict(model.state_dict())


@pytest.mark.parametrize("prefix", ["", "model.", "model.esm.", "net.backbone.", "_forward_module.model.encoder_lm."])
def test_an_esm_in_a_lightning_file(tmp_path: Path, language_model: dict[str, Tensor], prefix: str) -> None:
    tuned = {prefix + name: value for name, value in language_model.items()}
    tuned["model.classifier.weight"] = torch.zeros(2, 3)
    path = tmp_path / "tuned.ckpt"
    content = {"epoch": 1, "global_step": 3, "state_dict": tuned, "hyper_parameters": {"lr": 1e-3}}
    torch.save(content, path)
    with pytest.warns(UserWarning, match=r"left out are weights of other parts than ESM-2: .*classifier\.weight"):
        model, _ = esm.load(path)
    assert same(dict(model.state_dict()), language_model)


def test_an_esm_in_shards(tmp_path: Path, language_model: dict[str, Tensor]) -> None:
    distinct = {name: value for name, value in language_model.items() if name != "lm_head.weight"}
    write_shards(tmp_path, {**distinct, "lm_head.weight": language_model["lm_head.weight"].clone()}, ".bin")
    assert same(dict(esm.load(tmp_path)[0].state_dict()), language_model)


def test_esm_files_that_leave_something_open(tmp_path: Path, language_model: dict[str, Tensor]) -> None:
    path = tmp_path / "tuned.ckpt"
    headless = {f"model.{name}": value for name, value in language_model.items() if not name.startswith("lm_head.")}
    torch.save({"state_dict": headless}, path)
    with pytest.raises(BadInput, match="tuned without its language-model head"):
        esm.load(path)
    two = {f"{part}.{name}": value for part in ("student", "teacher") for name, value in language_model.items()}
    torch.save({"state_dict": two}, path)
    with pytest.raises(BadInput, match="holds 2 language models, under 'student' and 'teacher'"):
        esm.load(path)


def test_boltz_reads_the_same_forms(tmp_path: Path) -> None:
    tensors = {f"module.pairformer_module.layers.0.{name}": torch.ones(1) for name in "abcdefghijkl"}
    write_shards(tmp_path, tensors, ".safetensors")
    read = boltz.read_checkpoint(tmp_path / "model.safetensors.index.json")
    assert read.state_dict.keys() == tensors.keys()
    (tmp_path / ".metadata").touch()
    with pytest.raises(BadInput, match=r"torch\.distributed\.checkpoint"):
        boltz.read_checkpoint(tmp_path)
