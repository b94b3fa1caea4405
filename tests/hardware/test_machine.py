"""What can be used here, told of packages that fail in every way that real ones do; none takes this process down."""

import importlib
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from foldkernels.kernels.common.blocking import block_dtype
from foldkernels.kernels.hardware import cpu, machine, packages

NAMES = ("triton", "trifast", "flash_attn", "cuequivariance_torch", "cuequivariance_ops_torch", "esm", "standin")


class StandIns:
    """Packages made for one test, first on the path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, module: str, code: str, distribution: str | None = None, version: str = "1.0") -> None:
        package = self.folder / module
        package.mkdir()
        (package / "__init__.py").write_text(textwrap.dedent(code))
        if distribution:
            self.installed(distribution, version)
        machine.refresh()

    def installed(self, distribution: str, version: str) -> None:
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


@pytest.fixture
def standins(tmp_path, monkeypatch):
    """Stand-ins, with the real packages out of the way."""
    loaded = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in NAMES}
    monkeypatch.syspath_prepend(str(tmp_path))
    machine.refresh()
    yield StandIns(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] in NAMES]:
        del sys.modules[name]
    sys.modules.update(loaded)
    monkeypatch.undo()
    machine.refresh()


def why(requirement: str, having: str | None = None) -> str:
    reason = machine.usable(requirement, having)
    assert reason is not None and reason.startswith(requirement)
    return reason


def test_a_package_that_works_is_usable_and_is_not_imported_here(standins):
    standins.add("trifast", "def triangle_attention(): ...", "trifast", "0.1.13")
    assert machine.usable("trifast") is None
    assert machine.usable("trifast>=0.1.13") is None
    assert "trifast" not in sys.modules
    assert machine.describe().packages["trifast"] == "0.1.13"
    assert machine.imported("trifast", having="triangle_attention").triangle_attention


def test_any_exception_is_kept_with_its_text(standins):
    standins.add("trifast", "raise AssertionError('Torch not compiled with CUDA enabled')")
    assert "AssertionError: Torch not compiled with CUDA enabled" in why("trifast>=0.1.13")
    with pytest.raises(machine.PackageUnusable, match="Torch not compiled"):
        machine.imported("trifast", having="triangle_attention")


def test_a_package_that_leaves_the_interpreter(standins):
    standins.add("standin", "raise SystemExit(3)")
    assert "SystemExit: 3" in why("standin")


def test_what_was_printed_is_told(standins):
    code = "print('Error while loading libcublas.so.13'); raise ImportError('cannot open shared object file')"
    standins.add("standin", code)
    assert "cannot open shared object file" in why("standin")
    assert "libcublas.so.13" in why("standin")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to tell of")
def test_an_abort_kills_another_process(standins):
    standins.add("cuequivariance_torch", "import os; os.write(2, b'compute capability 10.3'); os.abort()")
    standins.add("cuequivariance_ops_torch", "")
    reason = why("cuequivariance-torch>=0.13")
    assert "`import cuequivariance_torch` kills the process (SIGABRT)" in reason
    assert "compute capability 10.3" in reason
    with pytest.raises(machine.PackageUnusable, match="SIGABRT"):  # and not an import that aborts
        machine.imported("cuequivariance_torch")


@pytest.mark.parametrize("status", [0, 7])
def test_a_package_that_ends_the_process(standins, status):
    standins.add("standin", f"import os; os._exit({status})")
    assert f"ends the process (exit status {status})" in why("standin")


def test_a_package_that_hangs(standins, monkeypatch):
    monkeypatch.setenv("FOLDKERNELS_PROBE_TIMEOUT", "2")
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    standins.add("standin", code)
    assert "does not end within 2 s" in why("standin")


def test_one_that_dies_does_not_take_the_others_along(standins):
    standins.add("triton", "import os; os.abort()")
    standins.add("flash_attn", "raise OSError('libcudart.so.12')")
    standins.add("trifast", "def triangle_attention(): ...")
    assert machine.usable("trifast") is None
    assert "kills the process" in why("triton") or os.name == "nt"
    assert "OSError: libcudart.so.12" in why("flash-attn>=2.8")


def test_an_attribute_that_is_missing(standins):
    standins.add("flash_attn", "", "flash-attn", "2.8.3")  # as flash-attn-4 leaves it
    assert "`flash_attn` can be imported but has no `flash_attn_func`" in why("flash-attn>=2.8")
    standins.add("standin", "def __getattr__(name): raise RuntimeError('no driver')")
    assert machine.usable("standin") is None
    assert "has no `kernel` (RuntimeError: no driver)" in why("standin", having="kernel")


def test_cuequivariance_needs_its_ops(standins):
    functions = "triangle_attention = triangle_multiplicative_update = attention_pair_bias = print"
    standins.add("cuequivariance_torch", functions, "cuequivariance-torch", "0.13.0")
    reason = why("cuequivariance-torch>=0.13")
    assert "no module `cuequivariance_ops_torch`, which cuequivariance_torch needs" in reason
    standins.add("cuequivariance_ops_torch", "", "cuequivariance-ops-torch-cu13", "0.13.0")
    assert machine.usable("cuequivariance-torch>=0.13") is None
    standins.installed("cuequivariance-ops-torch-cu12", "0.8.0")
    assert "the installed cuequivariance-ops-torch-cu12 is 0.8.0" in why("cuequivariance-torch>=0.13")
    assert "write the same files" in machine.conflicts()[0]


def test_ops_for_another_cuda_are_told(standins, monkeypatch):
    standins.installed("cuequivariance-ops-torch-cu12", "0.13.0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "beside a torch for CUDA 13.0" in machine.conflicts()[0]
    assert "cuequivariance-ops-torch-cu13" in machine.fix("cuequivariance-torch")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert machine.conflicts() == []
    assert "cuequivariance-ops-torch-cu12" in machine.fix("cuequivariance-torch")


def test_a_version_too_old(standins):
    standins.add("trifast", "def triangle_attention(): ...", "trifast", "0.1.2")
    assert why("trifast>=0.1.13") == "trifast>=0.1.13: the installed trifast is 0.1.2"
    assert machine.usable("trifast") is None


def test_a_version_that_lies(standins):
    standins.add("trifast", "__version__ = '0.0.1'; triangle_attention = print", "trifast", "0.1.13")
    reason = why("trifast>=0.1.13")
    assert "trifast.__version__ is 0.0.1, though the installed trifast is 0.1.13" in reason


def test_a_version_that_is_not_told(standins):
    standins.add("standin", "")
    assert "does not tell its version" in why("standin>=1")
    standins.add("esm", "__version__ = 'unknown'; Alphabet = pretrained = print")
    assert "unknown" in why("fair-esm>=2")


def test_a_local_or_pre_release_counts(standins):
    standins.add("standin", "__version__ = '2.0.0rc1+cu130'")
    assert machine.usable("standin>=1.9") is None


def test_what_is_not_installed(standins):
    assert "not installed (no module `standin`)" in why("standin")
    with pytest.raises(machine.PackageUnusable, match="not installed"):
        machine.imported("standin")


def test_an_import_hook_that_refuses(standins, monkeypatch):
    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name == "standin":
                raise ImportError("not on this cluster")

    monkeypatch.setattr(sys, "meta_path", [Refuse(), *sys.meta_path])
    machine.refresh()
    assert "ImportError: not on this cluster" in why("standin")


def test_our_own_files_are_not_on_the_probes_path(standins):
    standins.add("standin", "import registry")  # there is a kernels/registry.py
    assert "No module named 'registry'" in why("standin")


def test_a_package_is_tried_once_by_many_threads(standins, tmp_path):
    counter = tmp_path / "imports"
    standins.add("standin", f"open({str(counter)!r}, 'a').write('x')")
    threads = [threading.Thread(target=machine.usable, args=("standin",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.read_text() == "x"
    machine.refresh()
    assert machine.usable("standin") is None
    assert counter.read_text() == "xx"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_forked_amid_a_trial_can_ask_too(standins):
    standins.add("standin", "import time; time.sleep(1.5)")
    program = """
        import os, sys, threading, time
        from foldkernels.kernels import machine
        threading.Thread(target=machine.usable, args=("standin",), daemon=True).start()
        time.sleep(0.5)  # the thread holds the lock now
        child = os.fork()
        if child == 0:
            os._exit(0 if machine.usable("no-such-package") else 1)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    path = os.pathsep.join([str(standins.folder), *filter(None, sys.path)])
    code = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)]
    assert subprocess.run(code, env=os.environ | {"PYTHONPATH": path}, timeout=60, check=False).returncode == 0


def test_a_failed_import_after_a_good_trial_is_told(standins):
    standins.add("standin", "import sys\nif 'pytest' in sys.modules: raise RuntimeError('only in this process')")
    assert machine.usable("standin") is None
    with pytest.raises(machine.PackageUnusable, match="RuntimeError: only in this process"):
        machine.imported("standin")


def test_a_requirement_that_is_none():
    with pytest.raises(ValueError, match="no requirement"):
        machine.usable("trifast >>= 3")
    assert machine.usable("no-such-package; sys_platform == 'plan9'") is None


def test_a_timeout_that_is_none(standins, monkeypatch):
    standins.add("standin", "")
    monkeypatch.setenv("FOLDKERNELS_PROBE_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="FOLDKERNELS_PROBE_TIMEOUT='soon'"):
        machine.usable("standin")


def test_what_to_do(standins):
    assert machine.fix("trifast>=0.1.13", "Linux") == "pip install 'trifast>=0.1.13'"
    assert machine.fix("flash-attn", "Linux") == "pip install --no-build-isolation flash-attn"
    assert "Linux only" in machine.fix("triton", "Darwin")
    assert machine.fix("fair-esm", "Darwin") == "pip install fair-esm"
    standins.add("esm", "raise RuntimeError('broken')")
    assert why("fair-esm")
    assert machine.fix("fair-esm") == "make `import esm` work, or pip uninstall fair-esm"


@pytest.mark.parametrize("name", machine.MACHINES)
def test_machines_are_data(name):
    other = machine.MACHINES[name]
    assert (other.device == "cuda") == (other.capability is not None) == (other.shared_memory_per_block > 0)
    assert other.lacks("torch>=2.6") is None
    assert (other.lacks("cuequivariance-torch>=0.13") is None) == (other.device == "cuda")
    assert ("trifast on" if other.device == "cuda" else "not installed on") in other.lacks("trifast>=9")
    assert "not installed on" in other.lacks("flash-attn>=2.8")
    assert hash(other) == hash(machine.MACHINES[name])


def test_a_machine_without_the_ops_wheel():
    bare = machine.Machine("bare", "cuda", (9, 0), packages={"cuequivariance-torch": "0.13.0"})
    assert "cuequivariance-ops-torch-cu13" in bare.lacks("cuequivariance-torch>=0.13")
    assert machine.MACHINES["mac"].fix("triton").startswith("none here")


def test_this_machine():
    here = machine.describe()
    assert here.device in ("cuda", "mps", "cpu")
    assert here.packages["torch"] == here.torch == torch.__version__
    assert here.memory_gib > 0
    assert machine.capability("cpu") is None
    assert machine.capability("cuda") == here.capability
    assert machine.fast_bfloat16() or not machine.amx()


def test_amx_needs_the_systems_leave(monkeypatch):
    lines = {"flags": "fpu avx2 avx512f amx_tile amx_bf16", "model name": "a CPU"}
    monkeypatch.setattr(cpu, "_cpuinfo", lambda key: lines.get(key, ""))
    monkeypatch.setattr(cpu.platform, "system", lambda: "Linux")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)  # this machine's own
    monkeypatch.delenv(cpu.FAST_VARIABLE, raising=False)
    for granted in (True, False):
        monkeypatch.setattr(torch.cpu, "_init_amx", lambda granted=granted: granted)
        machine.refresh()
        assert {"avx2", "avx512f", "amx_bf16"} <= cpu.features()
        assert machine.amx() is machine.fast_bfloat16() is granted
    monkeypatch.undo()
    machine.refresh()


@pytest.mark.parametrize("natively", [True, False])
def test_fast_products_can_be_forced(natively, monkeypatch):
    """A machine without 16-bit products runs what one with them runs, and the other way round."""
    monkeypatch.setattr(cpu, "natively_fast_bfloat16", lambda: natively)
    z = torch.empty(0, dtype=torch.bfloat16)
    for forced, expected in (("on", True), ("off", False), ("", natively)):
        monkeypatch.setenv(cpu.FAST_VARIABLE, forced)
        assert machine.fast_bfloat16() is expected
        assert block_dtype(z) is (torch.bfloat16 if expected else torch.float32)
    monkeypatch.setenv(cpu.FAST_VARIABLE, "maybe")
    with pytest.raises(ValueError, match="FOLDKERNELS_FAST_16BIT is 'on' or 'off', not 'maybe'"):
        machine.fast_bfloat16()


def test_a_mac_is_not_taken_for_fast(monkeypatch):
    monkeypatch.delenv(cpu.FAST_VARIABLE, raising=False)
    monkeypatch.setattr(cpu.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(cpu.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(cpu, "_sysctl", lambda key: "1" if key == "hw.optional.arm.FEAT_BF16" else "Apple M3")
    monkeypatch.setattr(cpu, "_cpuinfo", lambda key: "")
    machine.refresh()
    assert {"neon", "bf16"} <= cpu.features()
    assert not machine.fast_bfloat16()
    assert cpu.name() == "Apple M3"
    monkeypatch.undo()
    machine.refresh()


def test_a_frozen_program_is_not_started_again(standins, monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(subprocess, "Popen", None)
    standins.add("standin", "")
    assert machine.usable("standin") is None
    assert importlib.import_module("standin")


def test_no_process_can_be_started(standins, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    standins.add("standin", "")
    assert "no process could be started" in why("standin")


def test_known_packages_are_named_as_pip_does():
    from packaging.utils import canonicalize_name

    assert all(name == canonicalize_name(name) == package.name for name, package in packages.PACKAGES.items())
