"""`foldkernels doctor`: whatever is broken is a row and never a stack trace, and a wrong kernel is exit code 1."""

import collections
import json
import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from foldkernels.cli.doctor import cache_folders, compilers, issue_report
from foldkernels.cli.doctor import command as doctor
from foldkernels.cli.doctor.environment_variables import OURS
from foldkernels.cli.main import main
from foldkernels.kernels import registry
from foldkernels.kernels.testing import isolated, verification
from foldkernels.kernels.testing.cases import builders
from foldkernels.kernels.testing.verification import Item, Row, Subject

from ..hardware.test_machine import StandIns, standins  # noqa: F401
from ..support.standins import restored

SMALL = [Subject("attention", builders.SIZES["attention"][0])]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Runs the command in this process; its checks are of attention alone, and small."""
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(verification, "published_subjects", lambda: SMALL)

    def run(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["doctor", "--device", "cpu", *words])
        return code, capsys.readouterr().out

    return run


# Kernels that fail in every way --------------------------------------------------------------------------------------

PLANTED = """
    import os, time
    import torch
    from foldkernels.kernels import registry
    from foldkernels.kernels.attention import reference
    from foldkernels.kernels.registry.types import serves_everything

    def wrong(q, *rest):
        return reference.run(q, *rest) * 1.01

    def raises(q, *rest):
        raise RuntimeError("illegal instruction")

    def aborts(q, *rest):
        os.write(2, b"CUDA error 700")
        os.abort()

    def hangs(q, *rest):
        time.sleep(600)

    for function in ({functions},):
        registry.register(
            operation="attention", name=function.__name__, supports=serves_everything, load=lambda run=function: run
        )
"""


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes a module that registers some of those kernels, and gives its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(functions: str) -> str:
        (tmp_path / "planted_kernels.py").write_text(textwrap.dedent(PLANTED).replace("{functions}", functions))
        return "planted_kernels"

    with restored():
        yield write
    sys.modules.pop("planted_kernels", None)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to tell of")
def test_a_kernel_that_is_wrong_or_kills_the_process_is_a_row(call, plant):
    code, out = call("--json", "--import", plant("wrong, raises, aborts"))
    report = json.loads(out)
    rows = {row["kernel"]: row for row in report["checks"]}
    assert code == 1
    statuses = {name: row["status"] for name, row in rows.items()}
    assert statuses == {
        "torch": "passed", "wrong": "failed", "raises": "raised", "aborts": "died",
    }  # fmt: skip
    assert rows["wrong"]["error"] > rows["wrong"]["allowed"] > 0
    assert "illegal instruction" in rows["raises"]["why"]
    assert "SIGABRT" in rows["aborts"]["why"] and "CUDA error 700" in rows["aborts"]["why"]
    text = doctor.as_text(report)
    assert "died" in text and "SIGABRT" in text


@pytest.mark.slow
def test_a_kernel_that_hangs_is_a_row(call, plant, monkeypatch):
    monkeypatch.setenv("FOLDKERNELS_PROBE_TIMEOUT", "45")  # torch is imported in that time, too
    code, out = call("--json", "--import", plant("hangs"))
    rows = {row["kernel"]: row for row in json.loads(out)["checks"]}
    assert code == 1 and rows["hangs"]["status"] == "died" and "does not end within 45 s" in rows["hangs"]["why"]
    assert rows["torch"]["status"] == "passed"  # after it, in a process of its own


def test_a_plugin_that_aborts_is_left_out_in_the_other_process_too(tmp_path, monkeypatch):
    registry.operations()  # before it is there: everything that is known here stays known
    add_plugin(tmp_path, "killer", "import os; os.abort()")
    monkeypatch.syspath_prepend(str(tmp_path))
    with restored():
        registry.leave_out_plugins({"killer": "SIGABRT"})
        (row,) = isolated.verify_apart([Item(SMALL[0], "torch", "float32", "cpu", 5)])
    assert row.status == "passed", row


def add_plugin(folder: Path, name: str, code: str) -> None:
    """A distribution with one module, which registers kernels when it is loaded."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[foldkernels.kernels]\n{name} = {name}\n")


def test_no_other_process_can_be_started(monkeypatch):
    items = [Item(SMALL[0], "torch", "float32", "cpu", 5)]
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert [(row.status, "no process could be started" in row.why) for row in isolated.verify_apart(items)] == [
        ("died", True)
    ]
    monkeypatch.setattr(sys, "executable", "")
    assert [row.status for row in isolated.verify_apart(items)] == ["passed"]  # in this one


# Packages that fail in every way --------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to tell of")
def test_packages_that_raise_abort_hang_and_lie(call, standins: StandIns, monkeypatch):  # noqa: F811
    monkeypatch.setenv("FOLDKERNELS_PROBE_TIMEOUT", "5")
    standins.add("triton", "raise ImportError('libcuda.so.1: cannot open shared object file')")
    standins.add("cuequivariance_torch", "import os; os.abort()", "cuequivariance-torch", "0.13.0")
    standins.add("cuequivariance_ops_torch", "", "cuequivariance-ops-torch-cu12", "0.13.0")
    standins.installed("cuequivariance-ops-torch-cu13", "0.13.0")
    standins.add("trifast", "import time; time.sleep(600)", "trifast", "0.1.13")
    standins.add("flash_attn", "__version__ = '4.0.0'", "flash-attn", "2.8.3")
    code, out = call("--json", "--no-check")
    report = json.loads(out)
    assert code == 0 and report["problems"] == []
    whys = {name: package["why"] or "" for name, package in report["packages"].items()}
    assert "libcuda.so.1" in whys["triton"] and "SIGABRT" in whys["cuequivariance-torch"]
    assert "does not end within 5 s" in whys["trifast"] and "no `flash_attn_func`" in whys["flash-attn"]
    assert any("write the same files" in conflict for conflict in report["conflicts"])
    flash = next(finding for finding in report["toolchain"] if finding["name"] == "flash-attn")
    assert flash["ok"] is False and "2.8.3" in flash["found"] and flash["fix"]
    assert any("SIGABRT" in reason["why"] for reason in report["kernels"]["triangle_attention"]["cuequivariance"])
    assert "PROBLEM" in doctor.as_text(report)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to tell of")
def test_a_plugin_that_aborts_when_it_is_imported(tmp_path):
    """Everything in a process of its own, which has to come back."""
    add_plugin(tmp_path, "killer", "import os; os.abort()")
    add_plugin(tmp_path, "quitter", "raise SystemExit(3)")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    command = [sys.executable, "-m", "foldkernels", "doctor", "--device", "cpu", "--no-check", "--json"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "SIGABRT" in report["broken_plugins"]["killer"] and "SystemExit: 3" in report["broken_plugins"]["quitter"]
    assert report["kernels"]["attention"]["torch"] == [] and report["problems"] == []


def test_a_version_that_two_places_tell_differently(call, standins: StandIns):  # noqa: F811
    functions = "__version__ = '0.1.2'\ndef triangle_attention(): ..."
    standins.add("trifast", functions, "trifast", "0.1.13")
    report = doctor.examine("cpu")
    whys = [reason["why"] for reason in report["kernels"]["triangle_attention"]["trifast"]]
    assert any("0.1.2" in why for why in whys), whys


# Compilers, devices, folders ------------------------------------------------------------------------------------------


def finding(name: str) -> Any:
    return next(found for found in compilers.toolchain() if found["name"] == name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and torch sees it")
def test_a_driver_that_torch_makes_nothing_of(monkeypatch):
    monkeypatch.setattr(compilers, "_driver", lambda: "580.65.06")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert finding("CUDA")["ok"] is False and "without CUDA" in finding("CUDA")["found"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "sees no GPU" in finding("CUDA")["found"] and "driver" in finding("CUDA")["fix"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert finding("CUDA")["fix"] == "unset CUDA_VISIBLE_DEVICES"


def test_a_c_compiler_that_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    assert finding("C compiler")["ok"] is False
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "neither gcc nor clang" in finding("C compiler")["found"]


def test_triton_that_cannot_compile(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("foldkernels.kernels.hardware.packages.usable", lambda name: None)
    monkeypatch.setattr("foldkernels.kernels.hardware.packages.usable_version", lambda name: "3.7.1")
    for why, ok in (("RuntimeError: Failed to find C compiler", False), ("", True)):
        monkeypatch.setattr(isolated, "try_triton_apart", lambda why=why: why)
        assert compilers._triton()["ok"] is ok and why in str(compilers._triton()["found"])


def test_what_raises_while_looking_is_a_finding(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: 1 / 0)
    found = next(found for found in compilers.toolchain() if "ZeroDivisionError" in str(found["found"]))
    assert found["ok"] is False and found["name"] == "mps"


def test_folders_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FOLDKERNELS_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "new" / "folder"))
    found = {entry["name"]: entry for entry in cache_folders.caches()}
    assert "is no folder" in found["foldkernels"]["why"] and "FOLDKERNELS_CACHE" in found["foldkernels"]["fix"]
    assert found["torch.compile"]["why"] == "" and not found["torch.compile"]["exists"]
    assert found["torch.compile"]["free_gib"] > 0 and not (tmp_path / "new").exists()
    usage = collections.namedtuple("usage", "free")
    monkeypatch.setattr(cache_folders.shutil, "disk_usage", lambda path: usage(2**28))
    found = {entry["name"]: entry for entry in cache_folders.caches()}
    assert found["torch.compile"]["why"] == "only 0.2 GiB are free"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]  # nothing is left behind


# What may be shown to strangers ---------------------------------------------------------------------------------------


def test_an_issue_names_nobody(call, monkeypatch):
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: Path("/home/ada")))
    monkeypatch.setattr(issue_report.getpass, "getuser", lambda: "ada")
    monkeypatch.setattr(platform, "node", lambda: "difference-engine.example.org")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    lines = [
        "/home/ada/secret project/x",
        "/home/ada/venv/lib/site-packages/trifast/__init__.py",
        "/scratch/ada/run/cache (TRITON_CACHE_DIR)",
        "on difference-engine.example.org or difference-engine as ada",
        "key 0123456789abcdef",
        "https://ada:pw@example.org/simple",
        "pip install 'trifast>=0.1.13'",
        "adapters",
    ]
    text = "\n".join(lines)
    safe = issue_report.redacted(text)
    for private in ("ada/", "difference-engine", "0123456789abcdef", "pw@", "scratch", "as ada"):
        assert private not in safe, safe
    for useful in ("trifast/__init__.py", "pip install 'trifast>=0.1.13'", "TRITON_CACHE_DIR", "adapters"):
        assert useful.rpartition("/")[2] in safe, safe
    code, out = call("--issue", "--no-check")
    assert code == 0
    assert out.startswith("<details>") and out.count("```") == 2 and "/home/ada" not in out
    assert "invariant_point_attention" in out


def test_a_row_of_an_operation_without_example():
    report: Any = {"checks": [Row("theirs", why="nobody has said", status="no example").as_dict()]}
    assert "no example" in "\n".join(doctor._check_lines(report["checks"]))
