"""What this machine's processor can do."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from contextlib import suppress

import torch

FEATURES = frozenset(
    {"avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "neon", "sve", "bf16", "i8mm"}
)
"""What a kernel may ask about, under Linux's names; `neon` is what Linux calls asimd, `bf16` is ARM's."""

#: Forces 16-bit products of 16-bit data `on` or `off`, whatever the processor has.
FAST_VARIABLE = "FOLDKERNELS_FAST_16BIT"

_ALIASES = {"asimd": "neon", "avx512_f": "avx512f"}


@functools.lru_cache(maxsize=1)
def features() -> frozenset[str]:
    """The instruction sets of `FEATURES` that the processor has, by all that can be asked."""
    found = set(_cpuinfo("flags").split()) | set(_cpuinfo("Features").split())
    # torch reads the CPUID instruction, so that this also answers on Windows and on a Mac.
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # since torch 2.11
    if capabilities is not None:
        with suppress(Exception):  # a courtesy of torch's, which no answer of ours may depend on
            found |= {str(name) for name, value in capabilities().items() if value is True}
    if platform.machine().lower() in ("arm64", "aarch64"):
        found.add("neon")  # part of every 64-bit ARM processor
        if _sysctl("hw.optional.arm.FEAT_BF16") == "1":
            found.add("bf16")
    return frozenset(_ALIASES.get(name, name) for name in found) & FEATURES


@functools.lru_cache(maxsize=1)
def amx() -> bool:
    """Whether bfloat16 matrix products can run on AMX: the processor has it, and the system lets a program use it."""
    if not {"amx_tile", "amx_bf16"} <= features() or not torch.backends.mkldnn.is_available():
        return False
    # The tiles' state is large, so Linux hands it out on request only; a sandbox may refuse.
    request = getattr(torch.cpu, "_init_amx", None)
    try:
        return bool(request()) if request is not None else True
    except Exception:
        return False


def fast_bfloat16() -> bool:
    """Whether 16-bit data are multiplied in 16 bits on this CPU: they are where that is natively fast.

    Elsewhere a product in 16 bits costs more than one in float32. `FOLDKERNELS_FAST_16BIT` has the last word.

    Raises:
        ValueError: The variable is neither `on` nor `off`.
    """
    forced = os.environ.get(FAST_VARIABLE, "")
    if not forced:
        return natively_fast_bfloat16()
    if forced not in ("on", "off"):
        raise ValueError(f"{FAST_VARIABLE} is 'on' or 'off', not {forced!r}")
    return forced == "on"


@functools.lru_cache(maxsize=1)
def natively_fast_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 matrix products, and PyTorch uses them."""
    if not torch.backends.mkldnn.is_available():
        return False
    has = features()
    if platform.system() == "Darwin":
        return False  # the chips from M2 on have the instructions; torch's CPU products on a Mac do not use them
    return amx() or "avx512_bf16" in has or "bf16" in has


def name() -> str:
    """What the processor is called."""
    return _cpuinfo("model name") or _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def memory_gib() -> float:
    """The machine's memory; 0 where it cannot be read."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return 0.0


def refresh() -> None:
    """Forget what was found."""
    for function in (features, amx, natively_fast_bfloat16):
        function.cache_clear()


def _cpuinfo(key: str) -> str:
    """The first value of a key of Linux's /proc/cpuinfo; empty if there is none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == key:
                    return value.strip()
    except OSError:
        pass
    return ""


def _sysctl(key: str) -> str:
    """One of macOS's settings; empty elsewhere."""
    if platform.system() != "Darwin":
        return ""
    try:
        done = subprocess.run(["sysctl", "-n", key], check=False, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
