"""A Pairformer trunk out of a Boltz checkpoint: strictly, safely, and with errors that fit on a screen."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from foldkernels.compat import boltz
from foldkernels.errors import BadInput
from foldkernels.kernels.registry import KernelUnavailable, record_kernels
from foldkernels.modules.pairformer import PairformerModule, PairformerNoSeqModule

S, Z, BLOCKS, HEADS, WIDTH, PAIR_HEADS = 12, 8, 3, 3, 5, 2


def trunk(seed: int = 0, **more: Any) -> PairformerModule:
    """A stack of odd sizes, with weights that are nowhere zero."""
    return drawn(PairformerModule(S, Z, BLOCKS, HEADS, 0.0, WIDTH, PAIR_HEADS, **{"v2": True, **more}), seed)


def drawn(module: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.3)
    return module.eval()


def checkpoint(stack: nn.Module, prefix: str = boltz.TRUNK) -> dict[str, Any]:
    """As Boltz's training writes it: other parts of the model beside the trunk, and hyperparameters."""
    weights: OrderedDict[str, Tensor] = OrderedDict({"s_init.weight": torch.randn(3, 4)})
    weights |= {f"{prefix}{name}": value for name, value in stack.state_dict().items()}
    weights["structure_module.steps"] = torch.tensor(3)
    arguments = {"num_blocks": BLOCKS, "num_heads": HEADS, "dropout": 0.35, "v2": True}
    return {"state_dict": weights, "hyper_parameters": {"token_s": S, "pairformer_args": arguments}, "epoch": 3}


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(9)
    mask = torch.tensor([[1.0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    return torch.randn(2, 5, S), torch.randn(2, 5, 5, Z), mask, mask[:, :, None] * mask[:, None, :]


def write_lightning(path: Path, content: dict[str, Any]) -> Path:
    torch.save(content, path)
    return path


def write_weights(path: Path, content: dict[str, Any]) -> Path:
    torch.save(dict(content["state_dict"]), path)
    return path


def write_safetensors(path: Path, content: dict[str, Any]) -> Path:
    save_file(content["state_dict"], path)
    return path


@pytest.mark.parametrize(
    ("write", "name"),
    [(write_lightning, "boltz2.ckpt"), (write_weights, "boltz2.pt"), (write_safetensors, "boltz2.safetensors")],
)
def test_a_trunk_from_a_file(write: Callable[..., Path], name: str, tmp_path: Path) -> None:
    original = trunk()
    loaded = boltz.load_pairformer(write(tmp_path / name, checkpoint(original)), kernel="torch")
    assert isinstance(loaded, PairformerModule)
    assert not loaded.training
    for key, value in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    with record_kernels() as ran:
        found = loaded(*inputs())
    assert {line.partition(": ")[2] for line in ran} == {"torch"}
    for x, y in zip(found, original(*inputs()), strict=True):
        torch.testing.assert_close(x, y)
    assert loaded.layers[0].dropout == (0.35 if write is write_lightning else 0.25)


@pytest.mark.parametrize("more", [{"v2": False}, {"post_layer_norm": True}, {}])
def test_the_weights_tell_which_layer_it_is(more: dict[str, bool]) -> None:
    """Boltz-1's, Boltz-2's, with a last LayerNorm or without; from a state_dict, under another prefix."""
    original = trunk(**more)
    weights = checkpoint(original, "confidence_module.pairformer_stack.")["state_dict"]
    loaded = boltz.load_pairformer(weights, "confidence_module.pairformer_stack", activation_checkpointing=True)
    assert isinstance(loaded, PairformerModule)
    assert loaded.activation_checkpointing
    for x, y in zip(loaded(*inputs()), original(*inputs()), strict=True):
        torch.testing.assert_close(x, y)


def test_a_stack_without_a_sequence() -> None:
    original = drawn(PairformerNoSeqModule(Z, BLOCKS, 0.0, WIDTH, PAIR_HEADS))
    loaded = boltz.load_pairformer(
        checkpoint(original, "template_module.pairformer.")["state_dict"], "template_module.pairformer."
    )
    assert isinstance(loaded, PairformerNoSeqModule)
    _, z, _, pair_mask = inputs()
    torch.testing.assert_close(loaded(z, pair_mask), original(z, pair_mask))


def test_a_compiled_models_names_and_no_prefix() -> None:
    original = trunk()
    compiled = checkpoint(original, "pairformer_module._orig_mod.")["state_dict"]
    bare = dict(original.state_dict())
    for loaded in (boltz.load_pairformer(compiled), boltz.load_pairformer(bare, "")):
        assert torch.equal(loaded(*inputs())[1], original(*inputs())[1])


def test_a_copy_is_loaded() -> None:
    """Training the stack does not change the state_dict that it came from."""
    weights = trunk().state_dict()
    kept = {name: value.clone() for name, value in weights.items()}
    loaded = boltz.load_pairformer(weights, "")
    with torch.no_grad():
        for weight in loaded.parameters():
            weight.add_(1)
    assert all(torch.equal(weights[name], value) for name, value in kept.items())


def test_mismatches_fit_on_a_screen() -> None:
    content = checkpoint(trunk())["state_dict"]
    for name in [name for name in content if name.startswith("pairformer_module.layers.2.tri_")]:
        del content[name]
    content["pairformer_module.layers.1.extra.weight"] = torch.zeros(1)
    content["pairformer_module.layers.1.transition_z.fc1.weight"] = torch.zeros(2, 2)
    with pytest.raises(BadInput) as caught:
        boltz.load_pairformer(content)
    message = str(caught.value)
    assert len(message.splitlines()) < 20
    for part in (
        "the model has, but the checkpoint lacks (32):",
        "layers.2.tri_mul_out.norm_in.weight",
        "and 24 more",
        "the checkpoint has, but the model lacks (1):\n  layers.1.extra.weight",
        "layers.1.transition_z.fc1.weight: model (32, 8), checkpoint (2, 2)",
    ):
        assert part in message


def test_where_there_is_no_stack_the_others_are_named() -> None:
    content = checkpoint(trunk(), "confidence_module.pairformer_stack.")["state_dict"]
    with pytest.raises(
        BadInput, match=r"no Pairformer under 'pairformer_module\.'.*\n.*confidence_module\.pairformer_stack\."
    ):
        boltz.load_pairformer(content)
    with pytest.raises(BadInput, match="is it a Boltz checkpoint"):
        boltz.load_pairformer({"weight": torch.zeros(3)})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.1000000000.norm.weight", torch.zeros(1), "4 layers, but among their numbers are 1000000000"),
        ("layers.0.tri_att_start.linear.weight", torch.zeros(0, Z), "no Pairformer's|do not fit"),
        ("layers.0.attention.proj_z.1.weight", torch.zeros(5, Z), "5 heads cannot share a width of 12"),
        ("layers.0.tri_att_start.mha.linear_q.weight", torch.zeros(()), r"linear_q.weight has shape \(\)"),
        ("layers.0.attention.proj_q.weight", None, "attention.proj_q.weight is missing"),
    ],
)
def test_weights_that_make_no_sense(name: str, value: Tensor | None, message: str) -> None:
    weights = dict(trunk().state_dict())
    if value is None:
        del weights[name]
    else:
        weights[name] = value
    with pytest.raises(BadInput, match=message):
        boltz.load_pairformer(weights, "")


class Calls:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_nothing_in_a_hostile_file_runs(tmp_path: Path) -> None:
    mark, content = tmp_path / "mark", checkpoint(trunk())
    content["hyper_parameters"]["pairformer_args"]["dropout"] = Calls(mark)
    path = write_lightning(tmp_path / "hostile.ckpt", content)
    with pytest.raises(BadInput, match=r"hostile\.ckpt: refused, nothing in it was run.*mkdir"):
        boltz.load_pairformer(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the file does what it says to who lets it
    assert mark.exists()


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "broken.safetensors").write_bytes(b"\x10" + b"\0" * 30)
    write_lightning(tmp_path / "list.ckpt", [torch.zeros(1)])  # type: ignore[arg-type]
    write_lightning(tmp_path / "numbers.ckpt", {"a": 1, "b": torch.zeros(1)})
    write_lightning(tmp_path / "none.ckpt", {"state_dict": {}})
    for name, message in {
        "empty.safetensors": "the file is empty",
        "broken.safetensors": "not a safetensors file, or cut short",
        "missing.safetensors": "there is no such file",
        "missing.ckpt": "there is no such file",
        "list.ckpt": "this holds list, not a checkpoint",
        "numbers.ckpt": "these entries are no tensors: a",
        "none.ckpt": "there are no weights in it",
    }.items():
        with pytest.raises(BadInput, match=message):
            boltz.load_pairformer(tmp_path / name)


def test_kernels_and_devices_are_the_callers() -> None:
    weights = trunk().state_dict()
    loaded = boltz.load_pairformer(weights, "", kernel={"preset": "torch", "triangle_attention": "reference"})
    with record_kernels() as ran:
        loaded(*inputs())
    assert "triangle_attention: reference" in ran
    assert "triangle_multiplication: torch" in ran
    with pytest.raises(KernelUnavailable, match="nonesuch"):
        boltz.load_pairformer(weights, "", kernel={"triangle_attention": "nonesuch"})
    with pytest.raises(BadInput, match="device 'nonesuch' cannot be used"):
        boltz.load_pairformer(weights, "", device="nonesuch")
