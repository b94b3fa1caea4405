"""Measure fairly: interleaved pairs, memory in a fresh process, and the machine written into every row.

Times of this project are ratios of medians of interleaved pairs, because machines drift by more than the differences
of interest. Memory is what one call adds to a warm process. Both are best taken in a fresh process: glibc's allocator
learns from what was freed before, so the second measurement of a process is not the first.

    python -m benchmarks.measure            prints this machine
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

MEGABYTE = 1e6
NOTEWORTHY_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "avx_vnni", "asimd", "bf16", "sve")

# glibc hands blocks above mmap_threshold (it adapts, up to 32 MiB) back to the kernel when they are freed, and trims
# the heap's top; the next tensor of that size page-faults on every 4 KiB again. These settings make it keep what it
# has: 16 GiB is more than any of our tensors. Read once, at exec. Seen to work with glibc 2.36; a release that caps
# the threshold at 32 MiB ignores a larger value in silence, which is why every comparison also counts page faults.
KEEP_MEMORY = "glibc.malloc.mmap_threshold=17179869184:glibc.malloc.trim_threshold=17179869184"

# The opposite, for measuring memory: every block of 128 KiB or more is mapped by itself and unmapped when it is freed,
# and the threshold stays there. Peak RSS is then what is alive, and not how the heap happened to fragment: with glibc's
# defaults the same forward pass showed 93 or 135 MB, depending on what had been freed before it.
EXACT_MEMORY = "glibc.malloc.mmap_threshold=131072"


# --------------------------------------------------------------------------------------------------------------------
# The machine
# --------------------------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------------------------
# Time
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """How two functions compare in time.

    Attributes:
        a_ms: median time of one call of the first.
        b_ms: median time of one call of the second.
        ratio: a_ms / b_ms: above 1, the second is faster.
        low: lower end of the ratio's 95% bootstrap interval.
        high: its upper end.
        cpu_ratio: the same ratio in CPU time of this process, all threads, kernel included: other people's load on the
            machine does not enter it, threads that spin and GPUs make it meaningless.
        pairs: interleaved pairs measured.
        calls: calls per sample (short functions are called several times).
        a_faults: page faults served without disk (minor) in one call of the first, median.
        b_faults: the same of the second.
    """

    a_ms: float
    b_ms: float
    ratio: float
    low: float
    high: float
    cpu_ratio: float
    pairs: int
    calls: int
    a_faults: float
    b_faults: float


def compare(
    a: Callable[[], object],
    b: Callable[[], object],
    pairs: int = 7,
    *,
    warmups: int = 1,
    shortest_sample_s: float = 0.02,
    progress: Callable[[], object] | None = None,
) -> Comparison:
    """Time two functions in interleaved pairs, the order within a pair alternating.

    Args:
        a: the baseline.
        b: what is compared with it.
        pairs: how many pairs; seven is the least a quoted ratio may rest on.
        warmups: untimed calls of each before the first pair.
        shortest_sample_s: a sample repeats its function until it lasts about this long.
        progress: called after every pair.

    Returns:
        Medians, their ratio and its bootstrap interval.
    """
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    if a is b:
        raise ValueError("a and b are the same object; wrap one of them in a lambda to compare it with itself")
    for _ in range(max(1, warmups)):
        quickest = min(_sample(a, 1)[0], _sample(b, 1)[0])
    calls = max(1, min(1000, round(shortest_sample_s / max(quickest, 1e-7))))
    samples: dict[Callable[[], object], list[tuple[float, float, float]]] = {a: [], b: []}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for pair in range(pairs):
            for function in (a, b) if pair % 2 == 0 else (b, a):
                samples[function].append(_sample(function, calls))
            gc.collect()
            if progress is not None:
                progress()
    finally:
        if collecting:
            gc.enable()
    (a_s, a_cpu, a_faults), (b_s, b_cpu, b_faults) = (list(zip(*samples[function], strict=True)) for function in (a, b))
    low, high = _bootstrap(a_s, b_s)
    return Comparison(
        a_ms=1e3 * statistics.median(a_s),
        b_ms=1e3 * statistics.median(b_s),
        ratio=statistics.median(a_s) / statistics.median(b_s),
        low=low,
        high=high,
        cpu_ratio=statistics.median(a_cpu) / max(statistics.median(b_cpu), 1e-9),
        pairs=pairs,
        calls=calls,
        a_faults=statistics.median(a_faults),
        b_faults=statistics.median(b_faults),
    )


def _sample(function: Callable[[], object], calls: int) -> tuple[float, float, float]:
    """Seconds, CPU seconds and minor page faults of one call, averaged over `calls` of them."""
    _synchronise()
    before = time.perf_counter(), time.process_time(), float(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    for _ in range(calls):
        function()
    _synchronise()
    after = time.perf_counter(), time.process_time(), float(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    seconds, cpu, faults = ((end - start) / calls for start, end in zip(before, after, strict=True))
    return seconds, cpu, faults


def _on_cuda() -> bool:
    """Whether this process has tensors on a GPU; asking does not start CUDA."""
    return torch.cuda.is_available() and torch.cuda.memory_allocated() > 0


def _synchronise() -> None:
    """Wait for the GPU, where one is in use."""
    if _on_cuda():
        wait: Callable[[], None] = torch.cuda.synchronize
        wait()


def _bootstrap(a: Sequence[float], b: Sequence[float], draws: int = 2000, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of median(a) / median(b), resampling pairs: what slows both at once cancels."""
    generator = random.Random(0)
    pairs = list(zip(a, b, strict=True))
    ratios = []
    for _ in range(draws):
        drawn_a, drawn_b = zip(*generator.choices(pairs, k=len(pairs)), strict=True)
        ratios.append(statistics.median(drawn_a) / statistics.median(drawn_b))
    ratios.sort()
    tail = (1 - level) / 2
    return ratios[int(tail * draws)], ratios[min(draws - 1, int((1 - tail) * draws))]


# --------------------------------------------------------------------------------------------------------------------
# Fresh processes
# --------------------------------------------------------------------------------------------------------------------


class ChildFailed(RuntimeError):
    """A measurement in a fresh process raised, or the process died."""


def in_fresh_process(
    target: Callable[..., Any] | str,
    *arguments: Any,
    keep_memory: bool = False,
    environment: Mapping[str, str] | None = None,
    **keywords: Any,
) -> Any:
    """Call a module-level function in a new interpreter and return what it returns.

    Args:
        target: the function, or its address as "package.module:name".
        *arguments: JSON values.
        keep_memory: run under `KEEP_MEMORY`, so that glibc gives no memory back.
        environment: variables to add.
        **keywords: JSON values.

    Returns:
        The function's result, which must be a JSON value.

    Raises:
        ChildFailed: with the child's error output.
    """
    request = {"target": _address(target), "arguments": arguments, "keywords": keywords}
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    if keep_memory:
        variables["GLIBC_TUNABLES"] = KEEP_MEMORY
    variables.update(environment or {})
    this_module = _address(_answer).split(":")[0]
    with tempfile.TemporaryDirectory() as folder:
        reply = Path(folder) / "reply.json"
        child = subprocess.run(
            [sys.executable, "-c", f"from {this_module} import _answer; _answer()", str(reply)],
            input=json.dumps(request),
            env=variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if child.returncode != 0 or not reply.exists():
            raise ChildFailed(f"{request['target']} failed (exit status {child.returncode}):\n{child.stderr[-4000:]}")
        return json.loads(reply.read_text())


def _address(function: Callable[..., Any] | str) -> str:
    """`package.module:name`, also of a function in the script that is running."""
    if isinstance(function, str):
        return function
    name = function.__module__
    if name == "__main__":
        specification = getattr(sys.modules["__main__"], "__spec__", None)
        if specification is None:
            raise ValueError("a fresh process cannot find functions of a script: run it with `python -m`")
        name = specification.name
    if "<" in function.__qualname__:
        raise ValueError(f"{function.__qualname__} is not a module-level function")
    return f"{name}:{function.__qualname__}"


def _resolve(address: str) -> Callable[..., Any]:
    """The function at "package.module:name"."""
    module, name = address.split(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _answer() -> None:
    """The child's side of `in_fresh_process`."""
    request = json.load(sys.stdin)
    result = _resolve(request["target"])(*request["arguments"], **request["keywords"])
    Path(sys.argv[1]).write_text(json.dumps(result))


# --------------------------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------------------------


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
        On CUDA the peak of the allocator above what was allocated before; else peak RSS minus RSS before the call, with
        glibc under `EXACT_MEMORY`.
    """
    address = _address(prepare)
    exact = {"GLIBC_TUNABLES": EXACT_MEMORY}
    megabytes: float = in_fresh_process(_measure_peak, address, arguments, keywords, environment=exact)
    return megabytes


def _measure_peak(address: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> float:
    """The child's side of `extra_peak_memory`."""
    warm, call = _resolve(address)(*arguments, **keywords)
    warm()
    gc.collect()
    if _on_cuda():
        _synchronise()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        _synchronise()
        peak = torch.cuda.max_memory_allocated()
    else:
        _return_free_memory()
        before = _reset_peak_rss()
        kept = call()
        peak = _peak_rss()
    del kept  # until here: a result that is returned is part of what the call costs
    return (peak - before) / MEGABYTE


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
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def _status(name: str) -> int:
    """One of /proc/self/status's sizes, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")


# --------------------------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of a benchmark table.

    Attributes:
        name: what was measured, `component_mode_length`.
        precision: what our side may round to.
        baseline: what it is compared with.
        keep_memory: whether glibc was told to keep its memory.
        correct: whether the check before the measurement passed.
        check: the check, in words: errors and what they may be.
        time: None for a row that is red, or whose time was not asked for.
        memory_mb: extra peak memory of (baseline, ours), or None.
        kernels: which kernels ran on our side.
        machine: where.
        at: when, UTC, ISO 8601.
    """

    name: str
    precision: str
    baseline: str
    keep_memory: bool
    correct: bool
    check: str
    time: Comparison | None
    memory_mb: tuple[float, float] | None
    kernels: tuple[str, ...]
    machine: Machine
    at: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as a JSON list, making the folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    print(json.dumps(asdict(machine()), indent=1))
