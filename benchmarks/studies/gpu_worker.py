"""The GPU suite's worker: does items one after the other in a process that may die, and says what came of each.

Started by `gpu_suite.py`. Reads one JSON object a line, an item; answers with one JSON object a line. An item that
raises answers `raised`, with `fatal` where the GPU does not answer afterwards and the process has to be replaced.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch

from foldkernels.benchmarks.measure.timing import FLUSHED, event_seconds
from foldkernels.kernels.testing import contract_grid as grid
from foldkernels.kernels.testing.accuracy import reasons
from foldkernels.kernels.testing.cases.builders import PUBLISHED, has_example
from foldkernels.kernels.testing.cases.case import Case

from . import gpu_subjects, rows
from .gpu_subjects import SAMPLING_STEPS, Item

#: Lengths and layouts of the thinned contract grid.
GRID = ((17, "masked"), (33, "transposed"), (64, "plain"), (129, "masked"))
QUICK_GRID = ((7, "masked"),)
#: Seconds that one time may take, and how many calls at least and at most; of a call longer than LONG, fewer.
SECONDS, FEWEST, MOST = 0.35, 7, 100
LONG, FEWEST_LONG = 0.7, 3


def long_case(operation: str) -> Any:
    """A case of the published widths with the sizes of a long chain, and the values of a short one: to ask, not run."""
    from foldkernels.kernels import registry

    case = gpu_subjects.published(operation, 16, "cpu")
    return replace(case, dims={**case.dims, registry.operations()[operation].length: 4096})


def every_kernel() -> list[tuple[str, str]]:
    """Every kernel that there are inputs for."""
    from foldkernels.kernels import registry

    operations = sorted(filter(has_example, registry.operations()))
    return [(operation, kernel) for operation in operations for kernel in sorted(registry.kernels(operation))]


def why_not(case: Case, kernel: str, dtype: torch.dtype, device: str) -> str:
    """Every reason against a kernel, empty if it can run."""
    return "; ".join(str(reason) for reason in reasons(case, kernel, dtype, device))


def _compiles(operation: str, kernel: str) -> bool:
    from foldkernels.kernels import registry
    from foldkernels.kernels.hardware.requirements import parse

    needs = [parse(need).name for need in registry.kernels(operation)[kernel].needs]
    return any(name == "trifast" or name.startswith(("triton", "cuequivariance")) for name in needs)


class Worker:
    """Does items on one device."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.quick = device, quick
        self.cuda = device == "cuda"
        self.flush = torch.empty(FLUSHED if self.cuda else 1, dtype=torch.int8, device=device)

    def do(self, item: Item) -> dict[str, Any]:
        """The fields of the item's row."""
        result: dict[str, Any] = getattr(self, item.what)(item)
        return result

    def describe(self, item: Item) -> dict[str, Any]:
        """The machine, why each kernel cannot run on it, and which presets of the model differ on it."""
        from foldkernels.configs.presets import PRESETS
        from foldkernels.kernels import registry

        kernels: dict[str, dict[str, dict[str, str]]] = {}
        for operation, kernel in every_kernel():
            case = long_case(operation)
            kernels.setdefault(operation, {})[kernel] = {
                precision: why_not(case, kernel, Item("", precision=precision).dtype, self.device)
                for precision in ("bfloat16", "float32")
            }
        presets: dict[tuple[Any, ...], str] = {}
        for word in ("torch", "auto", "triton", "flash", "cuequivariance"):
            if word in PRESETS:
                both = ("invariant_point_attention", "edge_transition")
                chosen = tuple(self._chosen(registry, name, long_case(name).dims, word) for name in both)
                presets.setdefault(chosen, word)
        return {
            "machine": {**asdict(rows.machine()), **self._gpu()},
            "kernels": kernels,
            # Whose first call takes seconds.
            "compiled": {
                name: [kernel for kernel in some if _compiles(name, kernel)] for name, some in kernels.items()
            },
            # Kernels that are for long chains only are checked where they serve.
            "thresholds": {operation: max(registry.thresholds(operation), default=0) for operation in kernels},
            "presets": {word: list(chosen) for chosen, word in presets.items()},
        }

    def _chosen(self, registry: Any, operation: str, dims: Any, word: str) -> str:
        request = registry.Request(
            operation=operation,
            device=self.device,
            dtype=torch.bfloat16,
            capability=registry.machine.capability(self.device),
            dims=registry.Dims(dims),
        )
        name: str = registry.decide(request, {"preset": word, "fallback": "silent"}).kernel.name
        return f"{operation}: {name}"

    def _gpu(self) -> dict[str, Any]:
        if not self.cuda:
            return {}
        about = torch.cuda.get_device_properties(0)
        found = {"gib": about.total_memory / 2**30, "capability": f"{about.major}.{about.minor}"}
        found |= {"multiprocessors": about.multi_processor_count, "l2_mb": getattr(about, "L2_cache_size", 0) / 1e6}
        try:
            import triton

            found["triton"] = triton.__version__
        except ImportError:
            found["triton"] = ""
        return {**found, "cuda": str(torch.version.cuda)}

    def ready(self, item: Item) -> dict[str, Any]:
        """Everything is imported, and the GPU answers."""
        return {}

    def ceilings(self, item: Item) -> dict[str, Any]:
        """Copy bandwidth (bytes read and written) and the rates of matrix products, on random numbers."""
        side = 8192 if self.cuda else 256
        found = {"copy_tb_s": self._copy_bandwidth()}
        for precision in ("bfloat16", "tf32", "float32"):
            this = Item("", precision=precision)
            a, b = (torch.randn(side, side, device=self.device).to(this.dtype) for _ in range(2))
            with gpu_subjects.rounding(this):
                found[f"{precision}_tflop_s"] = 2 * side**3 / self._time(lambda a=a, b=b: a @ b)["ms"] / 1e9
        return found

    def _copy_bandwidth(self) -> float:
        big = torch.randn((1 << 28) if self.cuda else (1 << 20), device=self.device)
        into = torch.empty_like(big)
        return 2e-9 * big.nbytes / float(self._time(lambda: into.copy_(big))["ms"])

    def check(self, item: Item) -> dict[str, Any]:
        """At the published widths, before anything is timed."""
        if not item.subject.startswith("operation."):
            return gpu_subjects.check_layer(item, self.device)
        with gpu_subjects.rounding(item), _poisoned():
            return gpu_subjects.check_operation(item, self.device, item.length, "masked", PUBLISHED)

    def grid(self, item: Item) -> dict[str, Any]:
        """The contract's odd sizes, masks and layouts, thinned."""
        found: dict[str, Any] = {"correct": True, "check": "", "error": 0.0, "repeatable": True}
        operation, served = gpu_subjects.of(item), 0
        points: list[tuple[int, str, dict[str, Any]]] = [(*point, {}) for point in (QUICK_GRID if self.quick else GRID)]
        if operation == "invariant_point_attention":
            points.append((33, "masked", {"away": 100.0}))
        for n, variant, more in points:
            for size in (0, 1):
                case = grid.build(operation, n, variant, size, **more)
                if why_not(case, item.side, item.dtype, self.device):
                    continue
                with _poisoned():
                    got = gpu_subjects.check_operation(item, self.device, n, variant, size, **more)
                served += 1
                if not got["correct"]:
                    return got
                found["error"] = max(found["error"], got["error"])
                found["repeatable"] &= got["repeatable"]
                break
        words = f"{served} of {len(points)} points, the largest error {found['error']:.1e} of the largest value"
        return {**found, "check": words} if served else {"skipped": "it serves none of the grid's sizes"}

    def time(self, item: Item) -> dict[str, Any]:
        """Median and spread of a call, and what it adds to memory."""
        grid.truth_and_plain.cache_clear()
        if not item.subject.startswith("operation."):
            gpu_subjects.forget()
        with gpu_subjects.prepared(item, self.device) as run:
            run()  # compiles, tunes, fills pools
            before = self._memory(reset=True)
            kept = run()
            peak = self._memory()
            del kept
            found = self._time(run)
        if item.mode == "sample":
            found = {**found, **{name: found[name] / SAMPLING_STEPS for name in ("ms", "low_ms", "high_ms")}}
        return {**found, "peak_mb": (peak - before) / 1e6, "resident_mb": before / 1e6} if self.cuda else found

    def warm(self, item: Item) -> dict[str, Any]:
        """Call once what will be timed: it is compiled, and kept on disk for the process that times it."""
        started = time.perf_counter()
        gpu_subjects.forget()
        with gpu_subjects.prepared(item, self.device) as run:
            run()
            if self.cuda:
                torch.cuda.synchronize()
        return {"warm_s": time.perf_counter() - started}

    def longest(self, item: Item) -> dict[str, Any]:
        """The longest chain, downwards from `item.length` in steps of 5%, that runs within `item.gib`."""
        if not self.cuda:
            return {"skipped": "memory is measured on a GPU"}
        self.flush = torch.empty(1, device=self.device)
        gpu_subjects.forget()
        share = item.gib * 2**30 / torch.cuda.get_device_properties(0).total_memory
        length, tried = item.length, []
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
        try:
            for _ in range(6):
                tried.append(length)
                try:
                    self._once(item, length)
                except torch.cuda.OutOfMemoryError:
                    gc.collect()
                    torch.cuda.empty_cache()
                    length = int(0.95 * length)
                    continue
                return {"longest": length, "tried": tried}
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            self.flush = torch.empty(FLUSHED, dtype=torch.int8, device=self.device)
        return {"raised": f"none of {tried} fits"}

    def _once(self, item: Item, length: int) -> None:
        """By itself, so that nothing of it is alive when the next length is tried."""
        this = Item("time", item.subject, item.side, item.precision, item.mode, length)
        with gpu_subjects.prepared(this, self.device) as run:
            run()
            torch.cuda.synchronize()

    def alive(self) -> bool:
        """Whether the GPU still answers: after an illegal address, nothing in this process does."""
        try:
            if self.cuda:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        except Exception:
            return False
        return True

    def _memory(self, reset: bool = False) -> int:
        if not self.cuda:
            return 0
        torch.cuda.synchronize()
        if reset:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()

    def _time(self, run: Callable[[], object]) -> dict[str, Any]:
        """By CUDA events, every call after the L2 cache has been overwritten; by the clock on a CPU."""
        once = self._sample(run, 1 if self.quick else 2)[-1]
        fewest = FEWEST if once < 1e3 * LONG else FEWEST_LONG
        calls = 2 if self.quick else max(fewest, min(MOST, int(1e3 * SECONDS / max(once, 1e-3))))
        found = sorted(self._sample(run, calls))
        low, high = (found[min(len(found) - 1, int(share * len(found)))] for share in (0.2, 0.8))
        return {"ms": statistics.median(found), "low_ms": low, "high_ms": high, "calls": calls}

    def _sample(self, run: Callable[[], object], calls: int) -> list[float]:
        if not self.cuda:
            found = []
            for _ in range(calls):
                start = time.perf_counter()
                run()
                found.append(1e3 * (time.perf_counter() - start))
            return found
        return [1e3 * seconds for seconds in event_seconds(run, calls, self.flush)]


@contextmanager
def _poisoned() -> Iterator[None]:
    """Memory that was asked for and not yet written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def answer(worker: Worker, item: Item) -> dict[str, Any]:
    """Do an item; whatever it raises is the answer."""
    try:
        return worker.do(item)
    except Exception as error:
        if type(error).__name__ == "KernelUnavailable":
            return {"skipped": " ".join(str(error).split())}
        words = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        found: dict[str, Any] = {"raised": words, "trace": traceback.format_exc()[-1500:]}
    gc.collect()
    if not worker.alive():
        found["fatal"] = True
    return found


def main(kind: type[Worker] = Worker) -> None:
    """Answer until the questions end."""
    device, quick = sys.argv[1], sys.argv[2] == "quick"
    answers, sys.stdout = sys.stdout, sys.stderr
    worker = kind(device, quick)
    for line in sys.stdin:
        print(json.dumps(answer(worker, Item(**json.loads(line)))), file=answers, flush=True)


if __name__ == "__main__":
    main()
