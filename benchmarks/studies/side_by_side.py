"""One table of ours against a baseline: what every such benchmark's command does, whatever it compares.

A benchmark brings its tasks (dataclasses of JSON values with a `name` and a `precision`) and two functions, which run
in fresh processes: `measure_row(task, pairs)`, which checks and then times, and `prepare_memory(task, ours)`, as
`measure.extra_peak_memory` wants it. A row whose check is red has no time, and makes the command exit with 1.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from foldkernels.kernels.registry import record_kernels

from .rows import Comparison, Machine, Row, compare, extra_peak_memory, in_fresh_process, machine, write_rows

RESULTS = Path(__file__).parent / "results"

MeasureRow = Callable[[Mapping[str, Any], int], dict[str, Any]]
PrepareMemory = Callable[[Mapping[str, Any], bool], tuple[Callable[[], object], Callable[[], object]]]

Runner = Callable[[Any, bool], Callable[[], object]]


def check_and_time(
    task: Any, pairs: int, check: Callable[[Any], tuple[bool, str]], runner: Runner, tiny: int
) -> dict[str, Any]:
    """What a benchmark's `measure_row` does.

    Args:
        task: The row, which also has `threads` and a `length`.
        pairs: Interleaved pairs; 0 for the check alone.
        check: Whether our side is right, and in words how right it is.
        runner: Gives the call of a side: ours or not.
        tiny: The length at which the kernels that run are asked for.

    Returns:
        `correct`, `check`, `time`, `kernels`, `machine`: the parts of a `Row`.
    """
    torch.set_num_threads(task.threads)
    correct, words = check(task)
    timed = compare(runner(task, False), runner(task, True), pairs) if correct and pairs else None
    with record_kernels() as ran:
        runner(replace(task, length=tiny), True)()
    return {
        "correct": correct,
        "check": words,
        "time": asdict(timed) if timed else None,
        "kernels": sorted(set(ran)),
        "machine": asdict(machine()),
    }


def warm_up_and_call(
    task: Any, ours: bool, runner: Runner, tiny: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    """What a benchmark's `prepare_memory` gives: a warm-up at a tiny length, and the call whose memory is measured."""
    torch.set_num_threads(task.threads)
    return runner(replace(task, length=tiny), ours), runner(task, ours)


def arguments(prog: str, description: str, names: Sequence[str], output: str) -> argparse.ArgumentParser:
    """The command line that all tables share.

    Args:
        prog: As the user calls it.
        description: One line.
        names: The rows that there are.
        output: The JSON file's name in benchmarks/studies/results.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description, epilog="rows: " + " ".join(names))
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="PATTERN", help="shell patterns over row names")
    parser.add_argument(
        "--glibc", choices=("default", "keep", "both"), default="both", help="let glibc keep its memory"
    )
    parser.add_argument(
        "--pairs", type=int, help="interleaved pairs a row (7; 3 with --quick; 0: check and memory only)"
    )
    parser.add_argument("--threads", type=int, default=1, help="PyTorch threads (1)")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--quick", action="store_true", help="every row at a short length")
    parser.add_argument("--output", type=Path, default=RESULTS / output, help="where the rows go, as JSON")
    return parser


def wanted(patterns: Sequence[str], *names: str) -> bool:
    """Whether one of a row's names fits one of the patterns."""
    return any(fnmatch.fnmatch(name, pattern) for name in names for pattern in patterns)


def measure_rows(
    tasks: Sequence[Any],
    measure_row: MeasureRow,
    prepare_memory: PrepareMemory,
    baseline: Callable[[Any], str],
    *,
    glibc: Sequence[bool],
    pairs: int,
    memory: bool,
    advance: Callable[[str], None],
) -> Iterator[Row]:
    """Measure every task, with and without glibc's memory kept, and yield rows as they come.

    Args:
        tasks: The rows.
        measure_row: See this module's docstring.
        prepare_memory: Likewise.
        baseline: What a task is compared with, in words.
        glibc: Which of (default, keeping memory) to measure.
        pairs: Interleaved pairs; 0 leaves out the times.
        memory: Whether to measure peak memory, once per task: it does not depend on `glibc`.
        advance: Told what comes next, before each step.
    """
    for task in tasks:
        fields, megabytes = asdict(task), None
        for keep_memory in glibc:
            words = ", glibc keeps memory" if keep_memory else ""
            advance(f"{task.name} {task.precision}{words}")
            found = in_fresh_process(measure_row, fields, pairs, keep_memory=keep_memory)
            if memory and megabytes is None:
                advance(f"{task.name} {task.precision}, memory")
                if found["correct"]:
                    megabytes = (
                        extra_peak_memory(prepare_memory, fields, False),
                        extra_peak_memory(prepare_memory, fields, True),
                    )
            yield Row(
                name=task.name,
                precision=task.precision,
                baseline=baseline(task),
                keep_memory=keep_memory,
                correct=found["correct"],
                check=found["check"],
                time=Comparison(**found["time"]) if found["time"] else None,
                memory_mb=megabytes,
                kernels=tuple(found["kernels"]),
                machine=Machine(**{**found["machine"], "flags": tuple(found["machine"]["flags"])}),
            )


def print_table(rows: Sequence[Row], title: str) -> None:
    """Print the rows, the machine as the caption."""
    from rich.console import Console
    from rich.table import Table

    where = rows[0].machine
    table = Table(
        title=title,
        caption=f"{where.cpu}, {' '.join(where.flags)}, {where.threads} thread(s) of {where.cores} cores, "
        f"torch {where.torch}, {where.system}. Ratio of medians of interleaved pairs, 95% bootstrap interval.",
    )
    for column in ("row", "ours in", "glibc"):
        table.add_column(column)
    for column in ("original ms", "ours ms", "faster", "interval", "by CPU time", "extra MB", "faults"):
        table.add_column(column, justify="right")
    table.add_column("check")
    for row in rows:
        timed, memory = row.time, row.memory_mb
        table.add_row(
            row.name,
            row.precision,
            "keeps memory" if row.keep_memory else "default",
            f"{timed.a_ms:,.1f}" if timed else "",
            f"{timed.b_ms:,.1f}" if timed else "",
            f"{timed.ratio:.2f}x" if timed else "",
            f"{timed.low:.2f} to {timed.high:.2f}" if timed else "",
            f"{timed.cpu_ratio:.2f}x" if timed else "",
            f"{memory[0]:,.0f} -> {memory[1]:,.0f}" if memory else "",
            f"{timed.a_faults:,.0f} -> {timed.b_faults:,.0f}" if timed else "",
            "[green]right[/]" if row.correct else f"[red]WRONG[/] {row.check}",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def run(
    options: argparse.Namespace,
    tasks: Sequence[Any],
    measure_row: MeasureRow,
    prepare_memory: PrepareMemory,
    baseline: Callable[[Any], str],
    title: str,
) -> int:
    """Measure, with a progress bar; print the table; write the rows.

    Returns:
        0, or 1 when a row is red, or 2 when there is no task.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if not tasks:
        print(f"no row matches {' '.join(options.rows)}; --help lists them", file=sys.stderr)
        return 2
    glibc = {"default": (False,), "keep": (True,), "both": (False, True)}[options.glibc]
    pairs = (3 if options.quick else 7) if options.pairs is None else options.pairs
    memory = not options.no_memory
    rows: list[Row] = []
    columns = (TextColumn("{task.description:<50}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("", total=len(tasks) * (len(glibc) + memory), completed=-1)
        for row in measure_rows(
            tasks,
            measure_row,
            prepare_memory,
            baseline,
            glibc=glibc,
            pairs=pairs,
            memory=memory,
            advance=lambda what: progress.update(bar, description=what, advance=1),
        ):
            rows.append(row)
            write_rows(rows, options.output)  # after every row: a long run that is stopped keeps what it has
    print_table(rows, title)
    print(f"rows: {options.output}")
    return 0 if all(row.correct for row in rows) else 1
