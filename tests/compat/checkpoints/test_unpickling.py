"""Checkpoints are read as data: what is rebuilt is what torch rebuilds, and nothing in a file ever runs."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import pathlib
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foldkernels.compat.checkpoints import unpickler
from foldkernels.compat.checkpoints.torch_file import read_torch_file
from foldkernels.errors import BadInput

pytestmark = pytest.mark.quick

GOLDENS = Path(__file__).parents[2] / "goldens" / "multiflow"
CHECKPOINTS = ("small/last.ckpt", "small_chain/last.ckpt")
BLOCKED = ("omegaconf", "lightning", "pytorch_lightning", "wandb")


def zipped(path: Path, data: bytes, **records: bytes) -> Path:
    """A file as torch.save lays it out, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("last/data.pkl", data)
        archive.writestr("last/byteorder", sys.byteorder)
        archive.writestr("last/version", "3\n")
        for name, content in records.items():
            archive.writestr(f"last/{name.replace('__', '/')}", content)
    return path


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


def short_text(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def stack_global(module: str, name: str, *arguments: str) -> bytes:
    """A protocol 4 pickle that calls `module`'s (maybe dotted) `name`."""
    call = b"".join(short_text(a) for a in arguments)
    return b"\x80\x04" + short_text(module) + short_text(name) + b"\x93(" + call + b"tR."


def old_global(module: str, name: str, *arguments: str) -> bytes:
    """The same in protocol 2, where the name is two lines of text."""
    call = b"".join(b"X" + struct.pack("<I", len(a)) + a.encode() for a in arguments)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + call + b"tR."


def build_on(module: str, name: str, state: bytes) -> bytes:
    """Makes an instance without arguments and sets its state."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b")R" + state + b"b."


def hostile(canary: Path) -> dict[str, tuple[bytes, str | None]]:
    """Attack to (pickle, name that the refusal must tell); each would make the canary, or reach code that could."""
    touch, write = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    dumped = {
        "os.system": (Calls(os.system, touch), f"{os.name}.system" if os.name == "nt" else "posix.system"),
        "eval": (Calls(eval, write), "builtins.eval"),
        "exec": (Calls(exec, write), "builtins.exec"),
        "open": (Calls(open, str(canary), "w"), f"{open.__module__}.open"),  # _io from Python 3.13 on
        "import": (Calls(__import__, "antigravity"), "builtins.__import__"),
        "getattr": (Calls(getattr, "text", "format"), "builtins.getattr"),
        "popen": (Calls(subprocess.Popen, ["touch", str(canary)]), "subprocess.Popen"),
        "check_output": (Calls(subprocess.check_output, ["touch", str(canary)]), "subprocess.check_output"),
        "partial": (Calls(functools.partial, os.system, touch), "functools.partial"),
        "map": (Calls(map, os.system, [touch]), "builtins.map"),
        "torch.load": (Calls(torch.load, str(canary)), "torch.serialization.load"),
        "torch.hub.load": (Calls(torch.hub.load, "a/b", "c"), "torch.hub.load"),
        "torch.jit.load": (Calls(torch.jit.load, str(canary)), "torch.jit._serialization.load"),
        "torch.save": (Calls(torch.save, {}, str(canary)), "torch.serialization.save"),
        "torch.from_file": (Calls(torch.from_file, str(canary), True, 8), None),
        "np.load": (Calls(np.load, str(canary), None, True), None),
        "np.save": (Calls(np.save, str(canary), 1), None),
        "pickle.loads": (Calls(pickle.loads, pickle.dumps(Calls(os.system, touch))), "_pickle.loads"),
        "path.touch": (Calls(pathlib.Path.touch, canary), None),
        "in a state": (Calls(OrderedDict, state=Calls(os.system, touch)), None),
        "in a stand-in": (Calls(argparse.Namespace, Calls(os.system, touch)), None),
        "behind tensors": ({"state_dict": OrderedDict(a=1), "z": Calls(os.system, touch)}, None),
    }
    attacks = {
        f"{name}, protocol {protocol}": (pickle.dumps(value, protocol), refused if protocol == 4 else None)
        for name, (value, refused) in dumped.items()
        for protocol in (2, 4)  # protocol 2 writes the names that Python 2 knew
    }
    objects = np.array([Calls(os.system, touch)], dtype=object)
    attacks |= {
        "numpy objects": (pickle.dumps(objects, 4), None),
        "numpy object type": (old_global("numpy", "dtype", "O8"), "numpy.dtype"),
        "codec import": (old_global("_codecs", "encode", "x", "rot13"), "_codecs.encode"),
        "codec name": (stack_global("_codecs", "encode", "x", "os"), "_codecs.encode"),
        "codecs": (old_global("codecs", "encode", "x", "latin1"), "codecs.encode"),
        "old names": (old_global("__builtin__", "eval", write), "__builtin__.eval"),
        "file": (old_global("__builtin__", "file", str(canary), "w"), "__builtin__.file"),
        "dotted path": (stack_global("shutil", "os.system", touch), "shutil.os.system"),
        "dotted write": (stack_global("pathlib", "Path.touch", str(canary)), "pathlib.Path.touch"),
        "dotted argparse": (stack_global("argparse", "_os.system", touch), "argparse._os.system"),
        "dotted torch": (stack_global("torch", "_utils._rebuild_tensor_v2", "x"), "torch._utils._rebuild_tensor_v2"),
        "dotted collections": (stack_global("collections", "OrderedDict.fromkeys", "x"), None),
        "torch's os": (stack_global("torch.serialization", "os", "x"), "torch.serialization.os"),
        "numpy's os": (stack_global("numpy", "os", "x"), "numpy.os"),
        "import_module": (stack_global("importlib", "import_module", "antigravity"), "importlib.import_module"),
        "call a type": (stack_global("builtins", "str", "x"), "builtins.str"),
        "call a dtype": (old_global("torch", "float32", "x"), None),
        "call text": (b"\x80\x04" + short_text("os.system") + short_text(touch) + b"\x85R.", None),
        "call a stand-in": (
            b"\x80\x04" + stack_global("argparse", "FileType", "w")[2:-1] + short_text(str(canary)) + b"\x85R.",
            None,
        ),
        "name from a stand-in": (b"\x80\x04" + stack_global("argparse", "A")[2:-1] + short_text("x") + b"\x93.", None),
        "instance, protocol 0": (f"(S{touch!r}\nios\nsystem\n.".encode(), None),
        "object, protocol 1": (b"(cos\nsystem\n" + b"U" + bytes([len(touch)]) + touch.encode() + b"o.", None),
        "extension": (b"\x80\x02\x82\x01.", None),
        "text persistent id": (b"\x80\x02Pposix.system\n.", None),
        "persistent id": (b"\x80\x04" + short_text("anything") + b"Q.", None),
        "state of a tensor class": (build_on("torch", "Size", b"}"), None),
        "state of a dict": (b"\x80\x02}}b.", None),
        "memory": (b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "__builtin__.bytearray"),
        "deep key": (b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s.", None),
    }  # fmt: skip
    return attacks


ATTACKS = sorted(hostile(Path("canary")))


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_pickle_is_refused_and_nothing_runs(tmp_path: Path, attack: str) -> None:
    canary = tmp_path / "canary"
    data, refused = hostile(canary)[attack]
    path = zipped(tmp_path / "last.ckpt", data)
    with pytest.raises(BadInput) as caught:
        read_torch_file(path)
    assert not canary.exists()
    assert "antigravity" not in sys.modules, "reading a file must not import what it names"
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and len(message) < 900
    if attack != "deep key":
        assert "refused, nothing in it was run" in message and "Fix: " in message
    if refused is not None:
        assert repr(refused) in message
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=False, pickle_module=unpickler)
    assert not canary.exists()


def test_the_canary_works(tmp_path: Path) -> None:
    """The attacks are real: Python's own unpickler runs them."""
    canary = tmp_path / "canary"
    for attack in ("os.system, protocol 2", "os.system, protocol 4", "eval, protocol 2", "dotted path"):
        pickle.loads(hostile(canary)[attack][0])
        assert canary.exists(), attack
        canary.unlink()


def test_nothing_runs_by_pythons_own_account(tmp_path: Path) -> None:
    """Python's audit events see every exec, import, process and opened file; hooks stay, so in a process of its own."""
    for number, attack in enumerate(ATTACKS):
        zipped(tmp_path / f"{number}.ckpt", hostile(tmp_path / "canary")[attack][0])
    code = f"""
import sys, pathlib, torch, numpy
from foldkernels.errors import BadInput
from foldkernels.compat.checkpoints.torch_file import read_torch_file
files = sorted(pathlib.Path({str(tmp_path)!r}).glob("*.ckpt"))
def read(path):
    try:
        read_torch_file(path)
    except BadInput:
        return
    raise SystemExit(f"not refused: {{path}}")
for path in files:  # whatever we import lazily is imported now
    read(path)
seen = []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, pathlib.Path)) and str(arguments[0]).endswith(".ckpt"):
        return
    quiet = ("object.__getattr__", "sys._getframe", "builtins.id", "cpython.", "pathlib.", "os.listdir", "os.scandir")
    if not event.startswith(quiet):
        seen.append((event, str(arguments)[:200]))
sys.addaudithook(hook)
for path in files:
    read(path)
assert not seen, seen[:5]
eval("1 + 1")
assert seen, "the hook sees nothing"
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=child_environment())
    assert result.returncode == 0, result.stderr + result.stdout
    assert not (tmp_path / "canary").exists()


def child_environment() -> dict[str, str]:
    """A child process finds the package where this one did."""
    import foldkernels

    spec = foldkernels.__spec__
    assert spec is not None and spec.submodule_search_locations is not None
    roots = [str(Path(place).parent) for place in spec.submodule_search_locations]
    if not all(Path(root, "foldkernels").exists() for root in roots):  # an editable install finds itself
        return dict(os.environ)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*roots, os.environ.get("PYTHONPATH", "")])}


# ---- what is rebuilt


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_lightning_checkpoint_without_omegaconf(tmp_path: Path, name: str) -> None:
    """In a process where omegaconf and Lightning cannot be imported, weights and config come out whole."""
    code = f"""
import sys
for blocked in {BLOCKED!r}:
    sys.modules[blocked] = None
import json, pathlib, torch
from safetensors.torch import save_file
from foldkernels.compat.checkpoints.torch_file import read_torch_file
from foldkernels.compat.checkpoints.unpickler import plain
content = read_torch_file(pathlib.Path({str(GOLDENS / name)!r}))
save_file(dict(content["state_dict"]), {str(tmp_path / "weights")!r})
config = plain(content["hyper_parameters"])
rest = plain({{k: v for k, v in content.items() if k not in ("state_dict", "hyper_parameters", "optimizer_states")}})
state = [s["state"] for s in content["optimizer_states"]]
moments = [(tuple(v["exp_avg"].shape), float(v["exp_avg_sq"].sum())) for s in state for v in s.values()]
json.dump([config, rest["epoch"], rest["callbacks"], moments], open({str(tmp_path / "rest")!r}, "w"), default=str)
assert not any(module.partition(".")[0] in {BLOCKED!r} and sys.modules[module] for module in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=child_environment())
    from omegaconf import OmegaConf
    from safetensors.torch import load_file

    # The golden file is our own: here, and only here, the whole of it is unpickled.
    expected = torch.load(GOLDENS / name, weights_only=False)
    weights = load_file(tmp_path / "weights")
    assert sorted(weights) == sorted(expected["state_dict"])
    assert all(torch.equal(weights[key], value) for key, value in expected["state_dict"].items())
    config, epoch, callbacks, moments = json.loads((tmp_path / "rest").read_text())
    beside = OmegaConf.load((GOLDENS / name).parent / "config.yaml")
    assert (
        config["cfg"] == OmegaConf.to_container(expected["hyper_parameters"]["cfg"]) == OmegaConf.to_container(beside)
    )
    assert config["cfg"]["model"]["ipa"]["c_s"] == "${model.node_embed_size}"
    assert "${now:" in config["cfg"]["experiment"]["checkpointer"]["dirpath"]
    assert epoch == expected["epoch"] and list(callbacks) == list(expected["callbacks"])
    assert len(moments) == sum(len(state["state"]) for state in expected["optimizer_states"])


def values() -> dict[str, Any]:
    shared = torch.arange(12.0)
    return {
        "float": torch.randn(3, 4), "transposed": torch.randn(3, 4).t(), "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3), "bfloat16": torch.randn(2).bfloat16(), "half": torch.randn(2).half(),
        "int": torch.arange(3), "bool": torch.tensor([True, False]), "complex": torch.randn(2, dtype=torch.complex64),
        "expanded": torch.ones(1).expand(5), "slice": shared[3:9:2], "shared": shared,
        "parameter": torch.nn.Parameter(torch.ones(2)), "grad": torch.ones(2, requires_grad=True),
        "dtype": torch.float16, "device": torch.device("cuda:1"), "size": torch.Size([1, 2]),
        "array": np.arange(6.0).reshape(2, 3), "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big-endian": np.arange(3, dtype=">i4"), "text": np.array(["ab", "c"]), "numpy scalar": np.float32(1.5),
        "set": {1, 2}, "frozenset": frozenset([1]), "bytes": b"\xff\x00", "byte array": bytearray(b"x\xe9"),
        "no bytes": b"", "number": 1 + 2j, "long": 2**100, "negative": -5, "list": [1, [2.5, None, True]],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], "ordered": OrderedDict(b=1, a=2), "unicode": "Å ∂",
        "keys": {1: 2, (1, "a"): 3, None: 4, 2.5: 5},
    }  # fmt: skip


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_values_equal_torchs(tmp_path: Path, protocol: int, new_format: bool) -> None:
    path = tmp_path / "values.pt"
    torch.save(values(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=new_format)
    expected = torch.load(path, weights_only=False)
    ours = read_torch_file(path)
    assert isinstance(ours, dict)
    for found in (ours, torch.load(path, weights_only=False, pickle_module=unpickler)):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert type(found[key]) is type(value), key
            if isinstance(value, torch.Tensor):
                assert found[key].dtype == value.dtype and found[key].stride() == value.stride(), key
                assert found[key].requires_grad == value.requires_grad and torch.equal(found[key], value), key
            elif isinstance(value, np.ndarray):
                assert found[key].dtype == value.dtype and np.array_equal(found[key], value), key
            else:
                assert found[key] == value, key
    assert ours["slice"].untyped_storage().data_ptr() == ours["shared"].untyped_storage().data_ptr()


def test_new_dtypes_counter_and_defaultdict(tmp_path: Path) -> None:
    data: dict[str, Any] = {
        "f8": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
        "u16": torch.tensor([1, 65535], dtype=torch.uint16),
        "counter": Counter("aab"),
        "default": defaultdict(list, a=[1]),
    }
    torch.save(data, tmp_path / "x.pt")
    found = read_torch_file(tmp_path / "x.pt")
    assert isinstance(found, dict)
    assert found["f8"].dtype == torch.float8_e4m3fn and torch.equal(found["f8"].float(), data["f8"].float())
    assert found["u16"].tolist() == [1, 65535]
    assert found["counter"] == {"a": 2, "b": 1}
    # A factory would be a callable out of the file: the dict comes without it.
    assert found["default"] == {"a": [1]} and type(found["default"]) is dict


def test_module_versions_survive(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    torch.save(module.state_dict(), tmp_path / "x.pt")
    found = read_torch_file(tmp_path / "x.pt")
    assert found._metadata["1"] == {"version": 2}  # type: ignore[attr-defined]
    torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).load_state_dict(found)  # type: ignore[arg-type]


def test_settings_become_plain(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    config = {"a": {"b": "${c}", "missing": "???", "list": [1, {"x": None}], "f": 0.5, "p": Path("/x/y")}, "c": True}
    data = {
        "args": argparse.Namespace(arch="esm", layers=3, nested=argparse.Namespace(a=[1])),
        "path": Path("/a/b.txt"),
        "cfg": OmegaConf.create(config),
        "node": OmegaConf.create({"inner": "${other}", "other": {"z": 1}}),
    }
    for protocol in (2, 5):
        torch.save(data, tmp_path / "x.pt", pickle_protocol=protocol)
        found = read_torch_file(tmp_path / "x.pt")
        assert isinstance(found, dict)
        assert isinstance(found["args"], unpickler.StandIn) and found["args"].name == "argparse.Namespace"
        settings = unpickler.plain(found)
        assert settings == {
            "args": {"arch": "esm", "layers": 3, "nested": {"a": [1]}},
            "path": "/a/b.txt",
            "cfg": {**config, "a": {**config["a"], "p": "/x/y"}},  # type: ignore[dict-item]
            "node": {"inner": "${other}", "other": {"z": 1}},
        }


# ---- limits


def pickled_tensor(offset: int, size: tuple[int, ...], stride: tuple[int, ...], count: int = 4) -> bytes:
    """A protocol 2 pickle of one float32 tensor over a storage of `count` elements."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(value, Storage) else None

    file = io.BytesIO()
    Pickler(file, 2).dump(Calls(torch._utils._rebuild_tensor_v2, Storage(), offset, size, stride, False, OrderedDict()))
    return file.getvalue()


def test_tensors_stay_inside_their_storage(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    good = zipped(path, pickled_tensor(1, (3,), (1,)), data__0=struct.pack("4f", 1, 2, 3, 4))
    found = read_torch_file(good)
    assert isinstance(found, torch.Tensor) and found.tolist() == [2, 3, 4]
    bad: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = [
        (2, (3,), (1,)), (0, (5,), (1,)), (-1, (2,), (1,)), (0, (2,), (-1,)), (0, (2, 2), (3, 2)), (0, (2,), (1, 1)),
        (2**62, (1,), (1,)), (0, (2**40,), (0,)), (0, (2**32, 2**32), (0, 0)),
    ]  # fmt: skip
    for offset, size, stride in bad:
        zipped(path, pickled_tensor(offset, size, stride), data__0=bytes(16))
        with pytest.raises(BadInput, match="refused"):
            read_torch_file(path)


def test_storages_are_no_larger_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for count in (2**50, 2**31, 5, 3, -1):
        zipped(path, pickled_tensor(0, (1,), (1,), count), data__0=bytes(16))
        with pytest.raises(BadInput, match=r"more tensor data|instead of|two sizes"):
            read_torch_file(path)
    zipped(path, pickled_tensor(0, (1,), (1,)))
    with pytest.raises(BadInput, match="missing"):
        read_torch_file(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}, 2))
        archive.writestr("x/data/0", bytes(1 << 20))
    with pytest.raises(BadInput, match="compressed"):
        read_torch_file(path)


def test_old_files_ask_for_no_more_than_they_hold(tmp_path: Path) -> None:
    """In the old format the storages are made before their bytes are read: a lie must not fill the memory."""
    path = tmp_path / "x.pt"
    little = {"little_endian": sys.byteorder == "little"}
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, little))
    good = struct.pack("<q", 4) + struct.pack("4f", 1, 2, 3, 4)
    path.write_bytes(head + pickled_tensor(0, (4,), (1,)) + pickle.dumps(["0"], 2) + good)
    found = read_torch_file(path)
    assert isinstance(found, torch.Tensor) and found.tolist() == [1, 2, 3, 4]
    path.write_bytes(head + pickled_tensor(0, (4,), (1,), 2**45) + pickle.dumps(["0"], 2) + good)
    with pytest.raises(BadInput, match="more tensor data"):
        read_torch_file(path)
    path.write_bytes(head + pickled_tensor(0, (4,), (1,)) + pickle.dumps(["1"], 2) + good)
    with pytest.raises(BadInput, match="list of storages"):
        read_torch_file(path)


def test_endless_pickles_end() -> None:
    limits = unpickler.Limits(steps=1000, pickle_bytes=100_000)
    for data in (
        b"\x80\x02" + b"]" * 5000 + b".",
        b"\x80\x02X\xff\xff\xff\x7fabc",
        b"\x80\x02" + b"N0" * 60_000 + b"N.",
    ):
        with pytest.raises(unpickler.UnpicklingError, match=r"too long|steps"):
            unpickler.loads(data, limits=limits)
    # A call that copies a long list counts as many steps as the list has elements.
    copies = b"\x80\x02](" + b"K\x01" * 300 + b"eq\x00" + b"c__builtin__\nset\nh\x00\x85R" * 5 + b"."
    with pytest.raises(unpickler.UnpicklingError, match="steps"):
        unpickler.loads(copies, limits=limits)


def test_plain_refuses_what_unfolds_forever() -> None:
    laughs: Any = "ha"
    for _ in range(40):
        laughs = [laughs, laughs]
    loop: list[Any] = []
    loop.append(loop)
    for value in (laughs, loop):
        with pytest.raises(unpickler.UnpicklingError, match="unfold"):
            unpickler.plain(value)
    assert unpickler.plain({"a": [np.float64(1.5)]}) == {"a": [1.5]}


# ---- files that are no checkpoints


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    with pytest.raises(BadInput, match="no such file"):
        read_torch_file(path)
    cases = {
        b"": "empty",
        b"\n<!DOCTYPE html><html>404</html>": "web page",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "git-lfs",
        random.Random(0).randbytes(1000).replace(b"\x80", b"a"): "not a checkpoint",
        b"\x1f\x8b" + bytes(100): "gzip",
        b"PK\x03\x04" + bytes(100): "cut short or damaged",
        pickle.dumps({"a": 1}, 2): "plain pickle",
        b"\x80": "cut short or damaged",
    }
    for content, words in cases.items():
        path.write_bytes(content)
        with pytest.raises(BadInput, match=words) as caught:
            read_torch_file(path)
        assert str(path) in str(caught.value) and caught.value.hint
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    with pytest.raises(BadInput, match="tar"):
        read_torch_file(path)
    with pytest.raises(BadInput, match="cannot be read"):
        read_torch_file(tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "x")
    with pytest.raises(BadInput, match=r"data\.pkl"):
        read_torch_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}, 2))
        archive.writestr("x/byteorder", "big" if sys.byteorder == "little" else "little")
    with pytest.raises(BadInput, match="endian"):
        read_torch_file(path)


def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    zipped(path, pickle.dumps({}, 2), **{"constants.pkl": b"\x80\x02)."})
    with pytest.raises(BadInput, match="TorchScript"):
        read_torch_file(path)


@pytest.mark.parametrize("new_format", [True, False])
def test_cut_short_and_flipped_bytes(tmp_path: Path, new_format: bool) -> None:
    """Every damaged file gives BadInput, never another exception."""
    path = tmp_path / "x.pt"
    module = torch.nn.Linear(3, 2)
    content = {"state_dict": module.state_dict(), "n": np.float64(1), "ns": argparse.Namespace(a=[1, (2, 3)]), "s": {1}}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    whole = path.read_bytes()
    for end in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:end])
        with pytest.raises(BadInput):
            read_torch_file(path)
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_torch_file(path)
        except BadInput:
            refused += 1
    assert refused > 30


def test_damaged_numbers_are_noticed(tmp_path: Path) -> None:
    """One flipped bit in the weights fails the record's checksum."""
    path = tmp_path / "x.pt"
    tensor = torch.arange(1000.0)
    torch.save({"a": tensor}, path)
    data = bytearray(path.read_bytes())
    data[data.index(tensor.numpy().tobytes()) + 2001] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadInput, match="CRC"):
        read_torch_file(path)


def test_files_without_checksums(tmp_path: Path) -> None:
    """torch can be told to leave checksums out: such a file is not damaged."""
    path = tmp_path / "x.pt"
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save({"a": torch.arange(10)}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is not None, "this torch writes checksums after all: the test tests nothing"
    found = read_torch_file(path)
    assert isinstance(found, dict) and found["a"].tolist() == list(range(10))


def test_what_is_quoted_of_a_pickle_is_short() -> None:
    """A number of 60,000 letters that is none: the error says so in one line."""
    with pytest.raises(unpickler.UnpicklingError, match="could not convert") as caught:
        unpickler.loads(b"F" + b"a\\" * 30_000 + b"\n.")
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_unpickling_random_opcodes_never_raises_anything_else() -> None:
    rng = random.Random(1)
    with zipfile.ZipFile(GOLDENS / CHECKPOINTS[1]) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
        seed = archive.read(name)
    limits = unpickler.Limits(steps=20_000)
    for _ in range(200):
        start = rng.randrange(len(seed) - 400)
        data = bytearray(b"\x80\x02(" + seed[start : start + 300] + b".")
        for _ in range(3):
            data[rng.randrange(3, len(data))] = rng.choice(b"cR\x81bsuaeq0.2(tl\x93Q}])")
        with contextlib.suppress(unpickler.UnpicklingError):
            unpickler.loads(bytes(data), limits=limits)
