"""What a machine and its packages can do: this one, probed once and only when asked, or another, described as data."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from . import cpu, packages
from .cpu import amx, fast_bfloat16
from .packages import PackageUnusable, conflicts, fix, imported, package_of, usable
from .requirements import check_version, parse

__all__ = [
    "MACHINES",
    "Machine",
    "PackageUnusable",
    "amx",
    "capability",
    "conflicts",
    "describe",
    "fast_bfloat16",
    "fix",
    "imported",
    "is_out_of_memory",
    "refresh",
    "usable",
]


@dataclass(frozen=True)
class Machine:
    """A machine, as data only: the choice of kernels for an H100 or a Mac can be made anywhere.

    Attributes:
        name: What it is called, for people.
        device: The best device type that it has: `cuda`, `mps` or `cpu`.
        capability: NVIDIA's compute capability. None elsewhere, ROCm among them, whose numbers would read as one.
        shared_memory_per_block: Bytes that one thread block may ask for; 0 without a GPU.
        memory_gib: The GPU's memory, or the machine's where the GPU shares it or there is none.
        cpu_features: Those of `cpu.FEATURES` that the processor has.
        packages: The packages that can be used, and their versions.
        python: Its version.
        torch: Its version.
        cuda: The CUDA version that torch was built for, None for other builds.
        hip: The same for ROCm.
        system: `Linux`, `Darwin` or `Windows`.
    """

    name: str
    device: str
    capability: tuple[int, int] | None = None
    shared_memory_per_block: int = 0
    memory_gib: float = 0.0
    cpu_features: frozenset[str] = frozenset()
    packages: Mapping[str, str] = field(default_factory=dict, hash=False)
    python: str = "3.12.0"
    torch: str = "2.13.0"
    cuda: str | None = None
    hip: str | None = None
    system: str = "Linux"

    def lacks(self, requirement: str) -> str | None:
        """Say why a requirement is not met by `packages`, or None if it is.

        Args:
            requirement: As pip reads it: `triton`, `trifast>=0.1.13`.
        """
        package = package_of(parse(requirement).name)
        if package.name not in self.packages:
            return f"{requirement}: not installed on {self.name}"
        for alternatives in package.needs:
            if not any(name in self.packages for name in alternatives):
                return f"{requirement}: {' or '.join(alternatives)}, which it needs, is not installed on {self.name}"
        return check_version(requirement, [(f"{package.name} on {self.name}", self.packages[package.name])])

    def fix(self, requirement: str) -> str:
        """The command that meets a requirement on that machine, or why none does."""
        return fix(requirement, self.system)


def describe() -> Machine:
    """Describe this machine, which can take seconds: every known package that is installed is tried."""
    return _describe()


def capability(device: str = "cuda", index: int | None = None) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA GPU of this machine; None for everything else.

    Args:
        device: The device's type.
        index: Which of them; the current one when None.
    """
    if device != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return _capability(torch.cuda.current_device() if index is None else index)


def refresh() -> None:
    """Forget all that was found, so that the next question probes again: after an installation, and in tests."""
    for function in (_describe, _capability):
        function.cache_clear()
    cpu.refresh()
    packages.refresh()


@functools.lru_cache(maxsize=64)
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.lru_cache(maxsize=1)
def _describe() -> Machine:
    name, device, shared, memory = cpu.name(), "cpu", 0, cpu.memory_gib()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        name, device, memory = properties.name, "cuda", properties.total_memory / 2**30
        # What a kernel may opt in to; without that word, a block gets 48 KiB.
        shared = int(getattr(properties, "shared_memory_per_block_optin", 0)) or 48 * 1024
    elif torch.backends.mps.is_available():
        device = "mps"
    found = {"torch": str(torch.__version__)}
    for package in packages.PACKAGES.values():
        if (version := packages.usable_version(package.name)) is not None:
            found |= {package.name: version, **packages.parts(package)}
    return Machine(
        name=name,
        device=device,
        capability=capability(device),
        shared_memory_per_block=shared,
        memory_gib=memory,
        cpu_features=cpu.features(),
        packages=found,
        python=platform.python_version(),
        torch=str(torch.__version__),
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        system=platform.system(),
    )


_TORCH = {"torch": "2.13.0"}
# What `pip install '.[cuda]'` gives on Linux with an NVIDIA GPU; Triton comes with torch.
_CUDA = {
    **_TORCH,
    "triton": "3.7.0",
    "trifast": "0.1.13",
    "cuequivariance-torch": "0.13.0",
    "cuequivariance-ops-torch-cu13": "0.13.0",
}
_SERVER_CPU = frozenset({"avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"})

MACHINES: dict[str, Machine] = {
    "h100": Machine("NVIDIA H100 80GB HBM3", "cuda", (9, 0), 227 * 1024, 80.0, _SERVER_CPU, dict(_CUDA), cuda="13.0"),
    "a100": Machine(
        "NVIDIA A100-SXM4-80GB", "cuda", (8, 0), 163 * 1024, 80.0, frozenset({"avx2"}), dict(_CUDA), cuda="13.0"
    ),
    "rtx4090": Machine(
        "NVIDIA GeForce RTX 4090", "cuda", (8, 9), 99 * 1024, 24.0, frozenset({"avx2"}), dict(_CUDA), cuda="13.0"
    ),
    "mac": Machine(
        "Apple M3 Max",
        "mps",
        memory_gib=36.0,
        cpu_features=frozenset({"neon", "bf16"}),
        packages=dict(_TORCH),
        system="Darwin",
    ),
    "cpu": Machine("a CPU with AVX2", "cpu", memory_gib=16.0, cpu_features=frozenset({"avx2"}), packages=dict(_TORCH)),
}
"""Machines that people have, for `foldkernels explain --machine`: typical of their kind, not measured."""


#: How PyTorch's allocators on a CPU and on MPS, and its own arithmetic of sizes, say that there is not so much memory.
_NO_ROOM = ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc",
            "Storage size calculation overflowed", "Invalid buffer size")  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that more memory was asked for than there is, on any device.

    On a CPU, and on MPS, PyTorch raises a plain RuntimeError.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_ROOM)
