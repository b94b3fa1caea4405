"""What choosing a kernel costs: microseconds of a warm call, beside calling the kernel's function directly.

    python -m benchmarks.studies.dispatch_cpu              every operation; rows to results/dispatch_cpu.json
    python -m benchmarks.studies.dispatch_cpu --samples 20 does it run

Run from the repository's root. Four times are taken in turns, many short samples each, so that all of them see the same
machine; the median and the quietest twentieth are kept, as other work on the machine only ever adds.

* `bound`: `function_for` with a module's token, as `bind` leaves it; `unbound` reads the environment as well.
* `entry`: the whole operation around a kernel that does nothing (the choice, the types, autocast, the tensors' sizes).
* `python`: an empty Python function with as many arguments, called directly: what no entry can be cheaper than. A
  choice costs what `bound` takes beyond it; what `entry` takes beyond `bound` is the operation's own.

A compiled graph holds the chosen function itself, and makes no choice.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .rows import Machine, machine

RESULTS = Path(__file__).parent / "results" / "dispatch_cpu.json"
CALLS = 50
LENGTH = 16
#: What a choice may cost, in microseconds, on an idle machine.
LIMIT = 5.0


@dataclass(frozen=True)
class Cost:
    """Microseconds of one call: the median of the samples, and their 5% quantile."""

    median: float
    quiet: float


@dataclass(frozen=True)
class Row:
    """One operation's costs; see the module."""

    operation: str
    kernel: str
    bound: Cost
    unbound: Cost
    entry: Cost
    python: Cost
    samples: int
    calls: int
    machine: Machine
    at: str


@dataclass(frozen=True)
class Subject:
    """What is timed of one operation.

    Attributes:
        operation: Its name.
        bound: Makes the choice under a token.
        unbound: Makes it under the environment's configuration.
        entry: Calls the operation, whose kernel does nothing.
        python: Calls that kernel.
    """

    operation: str
    bound: Callable[[], object]
    unbound: Callable[[], object]
    entry: Callable[[], object]
    python: Callable[[], object]


def subject(operation: str, kernel: str = "torch") -> Subject:
    """An operation on small inputs, its real call recorded once."""
    from foldkernels.kernels import registry
    from foldkernels.kernels.testing.accuracy import required
    from foldkernels.kernels.testing.cases.builders import SMALL, make

    case = make(operation, LENGTH, sizes=SMALL)
    values = {name: x.float() if x is not None and x.is_floating_point() else x for name, x in case.values.items()}
    home = importlib.import_module(f"foldkernels.kernels.{operation}")
    choose = registry.function_for
    asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    given: list[tuple[Any, ...]] = []
    answers: list[Any] = []

    def recorded(*arguments: Any, **keywords: Any) -> Callable[..., Any]:
        function = choose(*arguments, **keywords)
        asked.append((arguments, keywords))

        def recording(*tensors: Any) -> Any:
            given.append(tensors)
            answers.append(function(*tensors))
            return answers[-1]

        return recording

    home.function_for = recorded  # type: ignore[attr-defined]
    with torch.no_grad(), required(operation, kernel) as config:
        case.call(values, config)
    (arguments, keywords), tensors, answer = asked[0], given[0], answers[0]
    token = keywords["config"] or registry.token(registry.KernelConfig.model_validate({"preset": "torch"}))

    def nothing(*tensors: Any) -> Any:
        return answer

    def chosen(*arguments: Any, **keywords: Any) -> Callable[..., Any]:
        choose(*arguments, **keywords)
        return nothing

    home.function_for = chosen  # type: ignore[attr-defined]
    bound, unbound = {**keywords, "config": token}, {**keywords, "config": ""}
    return Subject(
        operation,
        lambda: choose(*arguments, **bound),
        lambda: choose(*arguments, **unbound),
        lambda: case.call(values, token),
        lambda: nothing(*tensors),
    )


def measure(one: Subject, samples: int) -> Row:
    """Time a subject's four functions in turns."""
    functions = (one.bound, one.unbound, one.entry, one.python)
    taken: list[list[float]] = [[] for _ in functions]
    with torch.no_grad():
        for _ in range(samples):
            for function, times in zip(functions, taken, strict=True):
                times.append(_sample(function))
    costs = [Cost(statistics.median(times), sorted(times)[len(times) // 20]) for times in taken]
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Row(one.operation, "torch", *costs, samples, CALLS, machine(), at)


def _sample(function: Callable[[], object]) -> float:
    function()
    start = time.perf_counter()
    for _ in range(CALLS):
        function()
    return (time.perf_counter() - start) / CALLS * 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    from foldkernels.kernels.registry import operations

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    print(f"{'microseconds: median (quiet)':30} {'bound':>14} {'unbound':>14} {'entry':>14} {'python':>14}")
    for operation in sorted(operations()):
        rows.append(measure(subject(operation), options.samples))
        costs = (rows[-1].bound, rows[-1].unbound, rows[-1].entry, rows[-1].python)
        print(f"{operation:30} " + " ".join(f"{cost.median:6.1f} ({cost.quiet:5.1f})" for cost in costs))
    worst = max(rows, key=lambda row: row.bound.quiet)
    print(f"the dearest choice: {worst.operation}, {worst.bound.quiet:.1f} us, of {LIMIT} allowed")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
