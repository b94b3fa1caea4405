"""Peak memory that one call adds to a warm process."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .fresh_process import EXACT_MEMORY, _address, _resolve, in_fresh_process
from .timing import on_cuda, on_mps, synchronise

MEGABYTE = 1e6


def extra_peak_memory(
    prepare: Callable[..., tuple[Callable[[], object], Callable[[], object]]] | str,
    *arguments: Any,
    **keywords: Any,
) -> float:
    """Megabytes (1e6 bytes) that one call adds to a warm process, at its peak.

    Args:
        prepare: module-level function that builds inputs and returns two functions: `warm`, the same work on a tiny
            input (imports, thread pools, oneDNN's own buffers), and `call`, what is measured.
        *arguments: JSON values for `prepare`.
        **keywords: JSON values for `prepare`.

    Returns:
        See `peak_of`; in the process of its own, glibc runs under `EXACT_MEMORY`.
    """
    address = _address(prepare)
    exact = {"GLIBC_TUNABLES": EXACT_MEMORY}
    megabytes: float = in_fresh_process(_measure_peak, address, arguments, keywords, environment=exact)
    return megabytes


def _measure_peak(address: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> float:
    """The child's side of `extra_peak_memory`."""
    warm, call = _resolve(address)(*arguments, **keywords)
    warm()
    return peak_of(call)


def peak_of(call: Callable[[], object]) -> float:
    """Megabytes (1e6 bytes) that one call adds at its peak, its result included, to what this process holds now.

    On CUDA the allocator's own count. On an Apple GPU, which counts no peak, what the allocator took from the system,
    cut to its pools' size: an upper bound. Elsewhere peak RSS, exact where glibc runs under `EXACT_MEMORY`.
    """
    gc.collect()
    if on_cuda():
        synchronise()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        synchronise()
        peak = torch.cuda.max_memory_allocated()
    elif on_mps():
        synchronise()
        torch.mps.empty_cache()
        before = torch.mps.driver_allocated_memory()
        kept = call()
        synchronise()
        peak = torch.mps.driver_allocated_memory()  # what the call freed stays in the allocator's pools
    else:
        _return_free_memory()
        before = _reset_peak_rss()
        kept = call()
        peak = _peak_rss()
    del kept  # until here: a result that is returned is part of what the call costs
    return (peak - before) / MEGABYTE


def can_reset_peak() -> bool:
    """Whether peak RSS can be measured again and again in one process; else each needs a process of its own."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _return_free_memory() -> None:
    """Give the allocator's free blocks back, or the call would reuse what the warm-up freed and look smaller."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_peak_rss() -> int:
    """Set the peak to the present resident memory, and return that, in bytes.

    Where the kernel cannot reset it (macOS, some containers), the peak so far is returned: the difference is then a
    lower bound, exact once the call exceeds everything before it.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return _peak_rss()


def _peak_rss() -> int:
    """Largest resident memory since the last reset, in bytes."""
    try:
        return _status("VmHWM")
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def _status(name: str) -> int:
    """One of /proc/self/status's sizes, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")
