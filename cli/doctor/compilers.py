"""What compiles and what computes: the C compiler, Triton, the NVIDIA driver, Apple's GPU, AMX. One finding each."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

#: name, whether all is well (None: does not concern this machine), what was found, and what would mend it.
Finding = dict[str, str | bool | None]


def toolchain() -> list[Finding]:
    """Every finding. Whatever fails while looking is a finding, too."""
    return [_attempt(look) for look in (_cuda, _c_compiler, _triton, _flash_attn, _mps, _amx)]


def _finding(name: str, ok: bool | None, found: str, fix: str = "") -> Finding:
    return {"name": name, "ok": ok, "found": found, "fix": fix}


def _attempt(look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except Exception as error:  # the machine may be broken in ways that nobody foresaw
        return _finding(look.__name__.strip("_").replace("_", " "), False, f"{type(error).__name__}: {error}")


def _cuda() -> Finding:
    """Torch's CUDA against the driver's."""
    import torch

    driver = _driver()
    built = torch.version.cuda or (torch.version.hip and f"ROCm {torch.version.hip}")
    if torch.cuda.is_available():
        gpus = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return _finding("CUDA", True, f"torch for {built}, driver {driver or 'unknown'}: {gpus}")
    if built is None and driver:
        fix = "pip install torch --index-url https://download.pytorch.org/whl/cu130"
        return _finding("CUDA", False, f"NVIDIA's driver {driver} is here, but this torch was built without CUDA", fix)
    if built is not None and driver:
        why = f"torch for {built} sees no GPU behind the driver {driver}"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None and hidden.strip() in ("", "-1"):
            return _finding("CUDA", False, f"{why}: CUDA_VISIBLE_DEVICES hides them", "unset CUDA_VISIBLE_DEVICES")
        return _finding("CUDA", False, why, "update the driver, or install a torch for an older CUDA")
    return _finding("CUDA", None, f"no NVIDIA driver; torch is built {f'for {built}' if built else 'without CUDA'}")


def _driver() -> str:
    """The NVIDIA driver's version, empty if there is none; without torch, which may be what is broken."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace").split()
        return next((word for word in words if word[0].isdigit() and "." in word), "of unknown version")
    except (OSError, IndexError):
        pass
    if (program := shutil.which("nvidia-smi")) is None:
        return ""
    try:
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.split() else ""


def _c_compiler() -> Finding:
    """Triton builds its launchers, and torch.compile its CPU code, with a C compiler and Python's headers."""
    name = "C compiler"
    if platform.system() == "Windows":
        return _finding(name, None, "Windows: torch.compile's own pages say what it needs")
    asked = os.environ.get("CC")
    names = asked.split()[:1] if asked and asked.strip() else ["gcc", "clang"]
    compiler = next((path for name in names if (path := shutil.which(name))), None)
    if compiler is None:
        found = f"CC={asked} is no program" if asked else "neither gcc nor clang"
        fix = "set CC to a C compiler" if asked else "apt install gcc (or what your system calls it), or set CC"
        return _finding(name, False, f"{found}; Triton's kernels and torch.compile need one", fix)
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.is_file():
        fix = "apt install python3-dev (or what your system calls it)"
        return _finding(name, False, f"{compiler} is here, Python.h is not; Triton's launchers need it", fix)
    done = subprocess.run([compiler, "--version"], check=False, capture_output=True, text=True, timeout=30)
    said = (done.stdout or done.stderr).splitlines()
    return _finding(name, done.returncode == 0, said[0] if said else f"{compiler} says nothing")


def _triton() -> Finding:
    """Really compiled and run, where there is a GPU; in another process, which may hang or die."""
    import torch

    from ...kernels.hardware.packages import fix, usable, usable_version
    from ...kernels.testing.isolated import try_triton_apart

    name = "Triton"
    if (why := usable("triton")) is not None:
        concerned = torch.cuda.is_available()
        return _finding(name, False if concerned else None, why, fix("triton") if concerned else "")
    version = usable_version("triton")
    if not torch.cuda.is_available():
        return _finding(name, None, f"{version}; no GPU to compile for")
    why = try_triton_apart()
    mend = "see `C compiler` and the cache folders; then TRITON_CACHE_DIR=<an empty folder>"
    if why:
        return _finding(name, False, f"{version}: a tiny kernel fails: {why}", mend)
    return _finding(name, True, f"{version}: a tiny kernel compiled, ran and gave the right numbers")


def _flash_attn() -> Finding:
    """Installed is not usable: flash-attn 4 has another interface under the same name."""
    from ...kernels.hardware.import_probe import installed_version
    from ...kernels.hardware.packages import fix, usable, usable_version

    why = usable("flash-attn")
    if why is None:
        return _finding("flash-attn", True, f"{usable_version('flash-attn')}, with its functions")
    installed = installed_version("flash-attn") or installed_version("flash-attn-4")
    if installed is None:
        return _finding("flash-attn", None, "not installed")
    return _finding("flash-attn", False, f"{installed} is installed, but {why}", fix("flash-attn"))


#: The first PyTorch whose matrix products on an M1 or M2 may be long (pytorch/pytorch 193487).
_RIGHT_SUMS = (2, 14)


def _mps() -> Finding:
    import torch

    if not torch.backends.mps.is_built():
        mac = platform.system() == "Darwin"
        return _finding(
            "MPS",
            False if mac else None,
            "this torch has no support for Apple's GPU",
            "pip install torch" if mac else "",
        )
    if not torch.backends.mps.is_available():
        return _finding("MPS", False, "torch is built for Apple's GPU and finds none it can use", "macOS 14 or newer")
    from ...kernels.hardware import cpu

    found, newer = "Apple's GPU is ready", tuple(map(int, torch.__version__.split(".")[:2])) >= _RIGHT_SUMS
    if newer or not any(chip in cpu.name().split() for chip in ("M1", "M2")):
        return _finding("MPS", True, found)
    why = f"{found}; but before torch 2.14, an M1 or M2 adds up more than 32,767 rows wrongly: do not train on it"
    return _finding("MPS", False, why, "pip install --upgrade 'torch>=2.14', or --device cpu (see docs/mac.md)")


def _amx() -> Finding:
    from ...kernels.hardware.cpu import amx, features

    if "amx_bf16" not in features():
        return _finding("AMX", None, "this processor has none")
    if amx():
        return _finding("AMX", True, "bfloat16 matrix products run on it")
    return _finding(
        "AMX",
        False,
        "the processor has it, the system does not let programs use it",
        "Linux 5.16 or newer, and a sandbox that allows arch_prctl",
    )
