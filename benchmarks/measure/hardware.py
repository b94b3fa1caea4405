"""The machine that a row was measured on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

NOTEWORTHY_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "avx_vnni", "asimd", "bf16", "sve")


@dataclass(frozen=True)
class Machine:
    """Where a row was measured.

    Attributes:
        cpu: the processor's own name, with family and model where the name says little.
        cores: cores this process may use.
        flags: the instruction sets that decide matrix product speed.
        isa: the instruction set PyTorch's own kernels chose.
        threads: PyTorch's intra-op threads.
        torch: version.
        python: version.
        system: kernel and C library.
        glibc_tunables: the environment variable, empty when unset.
        accelerator: the GPU's name, empty without one.
    """

    cpu: str
    cores: int
    flags: tuple[str, ...]
    isa: str
    threads: int
    torch: str
    python: str
    system: str
    glibc_tunables: str
    accelerator: str


def machine() -> Machine:
    """Describe the machine and this process."""
    info = _cpuinfo()
    cpu = info.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in info:
        cpu = f"{cpu} (family {info['cpu family']}, model {info['model']})"
    present = set((info.get("flags") or info.get("Features") or "").split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        cpu=cpu,
        cores=cores,
        flags=tuple(flag for flag in NOTEWORTHY_FLAGS if flag in present),
        isa=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}".strip(", "),
        glibc_tunables=os.environ.get("GLIBC_TUNABLES", ""),
        accelerator=torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    )


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
