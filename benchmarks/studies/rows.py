"""Measure fairly: interleaved pairs, memory in a fresh process, and the machine written into every row.

Times of this project are ratios of medians of interleaved pairs, because machines drift by more than the differences
of interest. Memory is what one call adds to a warm process. Both are best taken in a fresh process: glibc's allocator
learns from what was freed before, so the second measurement of a process is not the first. What measures is the
package's, `foldkernels bench` measures with it too.

    python -m benchmarks.studies.rows            prints this machine
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from foldkernels.benchmarks.measure.fresh_process import ChildFailed, in_fresh_process
from foldkernels.benchmarks.measure.hardware import Machine, machine
from foldkernels.benchmarks.measure.memory import extra_peak_memory
from foldkernels.benchmarks.measure.timing import Comparison, compare

__all__ = [
    "ChildFailed",
    "Comparison",
    "Machine",
    "Row",
    "compare",
    "extra_peak_memory",
    "in_fresh_process",
    "machine",
    "write_rows",
]


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
