"""`accelerate` as users meet it: DDP and DataParallel, the command, and the patch of the original Multiflow."""

from __future__ import annotations

import json
import pickle
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import foldkernels
from foldkernels.cli.main import main
from foldkernels.compat import multiflow as ours
from foldkernels.configs.resolve import ConfigError

from ...support.foreign import multiflow
from ...support.foreign.frames import random_rigid


class Model(nn.Module):
    """One layer of each kind, without weights that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.ipa = multiflow.ipa()
        self.edge = multiflow.edge_transition()

    def forward(self, s: Tensor, z: Tensor) -> Tensor:
        mask = torch.ones(s.shape[:2])
        z = self.edge(s, z)
        out: Tensor = self.ipa(s, z, random_rigid(*s.shape[:2]), mask)
        return out


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 7, 24, generator=generator), torch.randn(2, 7, 7, 16, generator=generator)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("when", ["before", "after"])
def test_ddp_before_and_after(process_group: None, when: str) -> None:
    """Every parameter gets its gradient, or DDP would complain in the second step."""
    wanted = Model()
    wanted(*inputs()).square().sum().backward()
    model = Model()
    if when == "before":
        foldkernels.accelerate(model)
    wrapped = DistributedDataParallel(model)
    if when == "after":
        assert foldkernels.accelerate(wrapped).replaced == ("module.ipa", "module.edge")
    for _ in range(2):
        wrapped.zero_grad()
        with foldkernels.record_kernels() as ran:
            wrapped(*inputs()).square().sum().backward()
    assert len(ran) == 2
    largest = max(float(p.grad.abs().max()) for p in wanted.parameters())
    for (name, found), right in zip(model.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(found.grad, right.grad, rtol=1e-4, atol=1e-5 * largest, msg=name)
    assert foldkernels.restore(wrapped) == 2


def test_a_replica_of_data_parallel_runs_on_its_own_weights() -> None:
    model = Model()
    foldkernels.accelerate(model)
    replica = model.ipa._replicate_for_data_parallel()
    assert replica.forward.module is replica and model.ipa.forward.module is model.ipa
    foldkernels.restore(model)
    assert "forward" not in model.ipa._replicate_for_data_parallel().__dict__


# --------------------------------------------------------------------------------------------------------- the command

FACTORY = """
import torch
from torch import nn

print("a line that is no part of the report")

class Layers(nn.Module):
    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        self.initial_embed = nn.Linear(8, 4)
        self.trunk = nn.Sequential(nn.Linear(14, 14), nn.ReLU(), nn.Linear(14, 14), nn.ReLU())
        self.final_layer = nn.Linear(14, 6)
        self.layer_norm = norm(6)

    def update(self, node_embed, edge_embed):
        n = self.initial_embed(node_embed)
        rows, columns = n[:, :, None].expand(-1, -1, n.shape[1], -1), n[:, None].expand(-1, n.shape[1], -1, -1)
        x = torch.cat([edge_embed, rows, columns], dim=-1)
        return self.layer_norm(self.final_layer(self.trunk(x) + x))

class EdgeTransition(Layers):
    def forward(self, node_embed, edge_embed):
        return self.update(node_embed, edge_embed)

class Wrong(Layers):
    def forward(self, node_embed, edge_embed):
        return self.update(node_embed, edge_embed) * 1.5

Wrong.__name__ = "EdgeTransition"
model = EdgeTransition()

def build():
    return nn.ModuleDict({"edge": EdgeTransition()})

def needs(argument):
    return argument

def other():
    return nn.Linear(2, 2)

def no_model():
    return 3

def leaves():
    raise SystemExit("no GPU")

number = 3
"""


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    (tmp_path / "users_models.py").write_text(FACTORY)
    (tmp_path / "broken_models.py").write_text("import nonesuch_package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("FOLDKERNELS_KERNEL", raising=False)

    def run(*words: str) -> tuple[int, str, str]:
        for name in ("users_models", "broken_models"):
            sys.modules.pop(name, None)
        capsys.readouterr()
        code = main(["accelerate", *words])
        return (code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("address", ["users_models:build", "users_models.py:build", "users_models:model"])
def test_check_prints_the_report(command: Callable[..., Any], address: str) -> None:
    code, out, err = command("--check", address, "--verify")
    assert code == 0
    assert "1 module accelerated" in out and "edge_transition: torch" in out and "verified: forward" in out
    assert "no part of the report" in err and "no part" not in out


def test_check_in_json(command: Callable[..., Any]) -> None:
    code, out, _ = command("--check", "users_models:build", "--json", "--kernel", "edge_transition=reference")
    report = json.loads(out)
    assert code == 0 and report["replaced"] == ["edge"]
    assert report["modules"][0]["kernels"] == ["edge_transition: reference"]


@pytest.mark.parametrize("address, words", [("other", "nothing to accelerate"), ("Wrong", "differs from its own")])
def test_exit_code_1(command: Callable[..., Any], address: str, words: str) -> None:
    code, out, _ = command("--check", f"users_models:{address}", "--verify")
    assert code == 1 and words in out


@pytest.mark.parametrize(
    "address, words",
    [
        ("users_models", "names no module and factory"),
        ("users_models:", "names no module and factory"),
        ("nonesuch:build", "ModuleNotFoundError: No module named 'nonesuch'"),
        ("nonesuch.py:build", "there is no such file"),
        ("broken_models:build", "No module named 'nonesuch_package'"),
        ("users_models:nonesuch", "has no 'nonesuch'"),
        ("users_models:needs", "TypeError: needs() missing 1 required positional argument"),
        ("users_models:no_model", "gave a int, no torch.nn.Module"),
        ("users_models:number", "is a int: neither a model nor a function"),
        ("users_models:leaves", "SystemExit: no GPU"),
    ],
)
def test_exit_code_2(command: Callable[..., Any], address: str, words: str) -> None:
    code, out, err = command("--check", address)
    assert code == 2 and out == "" and words in err and "Traceback" not in err


def test_a_required_kernel_that_cannot_run(command: Callable[..., Any]) -> None:
    code, _, err = command("--check", "users_models:build", "--kernel", "edge_transition=nonesuch")
    assert code == 2 and "has no kernel 'nonesuch'" in err


# ----------------------------------------------------------------------------------------------------------- the patch


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A package `multiflow` whose modules hold classes of their own, as the original's do."""

    found = types.SimpleNamespace()
    layout = {"ipa_pytorch": ("InvariantPointAttention", "EdgeTransition"), "edge_feature_net": ("EdgeFeatureNet",)}
    for name in ("multiflow", "multiflow.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, classes in layout.items():
        module = types.ModuleType(f"multiflow.models.{name}")
        for kind in classes:
            copied = type(kind, (getattr(multiflow, kind),), {"__init__": getattr(multiflow, kind).__init__})
            setattr(module, kind, copied)
            setattr(found, kind, copied)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def edges(original: types.SimpleNamespace) -> nn.Module:
    layer: nn.Module = original.EdgeTransition(node_embed_size=8, edge_embed_in=6, edge_embed_out=6)
    return layer


def replaced(module: nn.Module) -> bool:
    return "forward" in module.__dict__


def test_patched_classes_build_accelerated_layers(original: types.SimpleNamespace) -> None:
    before = {kind: kind.__init__ for kind in vars(original).values()}
    undo = ours.patch(kernel="reference")
    layers = [
        original.InvariantPointAttention(multiflow.ipa()._ipa_conf),
        edges(original),
        original.EdgeFeatureNet(multiflow.edge_features()._cfg),
    ]
    assert all(replaced(layer) and "reference" in layer.kernel_config for layer in layers)
    assert [list(layer.state_dict()) for layer in layers] == [
        list(layer.state_dict()) for layer in (multiflow.ipa(), edges(original), multiflow.edge_features())
    ]
    undo()
    undo()
    assert {kind: kind.__init__ for kind in vars(original).values()} == before
    assert not replaced(edges(original)) and replaced(layers[0])
    assert foldkernels.restore(layers[0]) == 1


def test_the_patch_is_a_context_manager(original: types.SimpleNamespace) -> None:
    with ours.patch() as patched:
        assert len(patched.classes) == 3 and replaced(edges(original))
        with pytest.raises(RuntimeError, match="patched already"):
            ours.patch()
    assert not replaced(edges(original))


def test_a_subclass_is_left_to_itself_and_a_changed_layer_is_told_of(original: types.SimpleNamespace) -> None:
    class Mine(original.EdgeTransition):  # type: ignore[name-defined,misc]
        pass

    with ours.patch(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not replaced(Mine(node_embed_size=8, edge_embed_in=6, edge_embed_out=6))
        assert caught == []
        original.EdgeTransition(node_embed_size=8, edge_embed_in=6, edge_embed_out=6, num_layers=3)
    assert "Multiflow's EdgeTransition is left alone: a submodule" in str(caught[0].message)


def test_the_patch_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, original: types.SimpleNamespace) -> None:
    with pytest.raises(ConfigError):
        ours.patch(kernel="nonesuch")
    monkeypatch.setitem(sys.modules, "multiflow.models.ipa_pytorch", None)
    with pytest.raises(ImportError, match=r"multiflow\.models\.ipa_pytorch cannot be imported"):
        ours.patch()


def test_an_accelerated_layer_is_pickled_by_its_own_class() -> None:
    layer = multiflow.edge_transition()
    foldkernels.accelerate(layer)
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is multiflow.EdgeTransition and replaced(again)
