"""`foldkernels bench`: how fast each kernel is on this machine, how much memory it takes, and whether it is right."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Debug, Device, Json, best_device, check_known, lengths_option, precisions, split
from .options import lengths as length_numbers
from .reporting import print_json, reported

if TYPE_CHECKING:
    from ..benchmarks.report.results import Results, Row
    from ..benchmarks.run.plan import Plan
    from ..benchmarks.run.runner import Run

NAME = "bench"
SUMMARY = "How fast each kernel is here, its memory, and whether it is right."
EXAMPLES = """\b
Examples:
  foldkernels bench
  foldkernels bench triangle_attention attention --length 128,256,512 --out bench/
  foldkernels bench weights/ --length 128,256 --kernel reference,auto
  foldkernels bench --model model.py:make --inputs model.py:batch --length 64,128
  foldkernels bench --compare bench/before/rows.json bench/after/rows.json
"""


class Mode(StrEnum):
    """The passes, as `--mode` names them."""

    FORWARD = "forward"
    BACKWARD = "forward+backward"
    BOTH = "both"


@reported
def run(
    operations: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OPERATION|WEIGHTS|CONFIG]...",
            help="What to measure: operations, or a model as --model takes it.  [default: every operation]",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="CONFIG|WEIGHTS|MODULE:FACTORY",
            help="A whole model: Multiflow's (a config.yaml, or a checkpoint's folder or file), or one of your own, "
            "which is imported and run; its sides are presets. Repeatable.",
        ),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            "--inputs",
            metavar="MODULE:FUNCTION",
            help="For a model of your own: called with a length, it gives the model's arguments: a tuple of them, a "
            "mapping of keyword arguments, or the only one.",
        ),
    ] = None,
    length: Annotated[list[str] | None, lengths_option("64,128,256 on a CPU")] = None,
    mode: Annotated[Mode, typer.Option("--mode", help="Without gradients, with all of them, or both.")] = Mode.BOTH,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype",
            metavar="TYPE[,TYPE]",
            help="float32, bfloat16 or float64 (also fp32, bf16, fp64); models run in bfloat16 under autocast.  "
            "[default: float32; on CUDA bfloat16,float32]",
        ),
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(
            "--kernel",
            "-k",
            metavar="WORD",
            help="What to compare: a kernel (torch), a preset (the kernel that it chooses), or OPERATION=KERNEL, which "
            "must run; repeatable, or separated by commas.  [default: all that can run here]",
        ),
    ] = None,
    baseline: Annotated[
        str,
        typer.Option("--baseline", metavar="KERNEL", help="What ratios are taken against.  [default: reference]"),
    ] = "",
    device: Device = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="PyTorch's threads.")] = None,
    rounds: Annotated[
        int, typer.Option("--rounds", min=3, help="Samples of each kernel, taken in turns; quote no fewer than 7.")
    ] = 7,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Whether to measure peak memory, too.")] = True,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget",
            metavar="SECONDS",
            min=1.0,
            help="Measure nothing that would not end within this time; what is left out is named.  [default: 240 where "
            "neither OPERATION, --model nor --length says what to measure; else none]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the inputs.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FOLDER", help="Where the results go.  [default: bench/<date and time>]"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results that are in --out.")] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--compare",
            metavar="OLD NEW",
            help="Measure nothing: say what got slower from one rows.json to another. Exit code 1 if anything did.",
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0.0, help="For --compare: by which part a time may change.")
    ] = 0.15,
    beside_baseline: Annotated[
        bool,
        typer.Option(
            "--beside-baseline",
            help="For --compare: compare each kernel's part of its baseline's time, so that a busier machine cancels.",
        ),
    ] = False,
    any_machine: Annotated[
        bool, typer.Option("--any-machine", help="For --compare: also rows of different machines.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check each kernel against float64, time those that are right, in turns, and write rows, plots and a report.

    In --out: report.page to read, rows.json to compare later, rows.csv, and a PNG for each operation or model (with
    matplotlib, the extra `plots`). Ctrl-C keeps what has been measured.

    Exit code 1 if a kernel's numbers are wrong, or --compare finds something slower; 2 if nothing could be measured, or
    a kernel required by OPERATION=KERNEL cannot run.
    """
    if compare is not None:
        _compare(*compare, tolerance, beside_baseline, any_machine, json)
        return
    if sys.platform == "win32":
        from ..errors import BadInput

        raise BadInput("foldkernels bench runs on Linux and macOS")
    from ..configs.seeds import generator_seed

    wanted = _plan(
        operations or [], model or [], inputs, length_numbers(length), mode, dtype, split(kernel),
        baseline, device, threads, rounds, memory, budget, generator_seed(seed),
    )  # fmt: skip
    _measure(wanted, _folder(out, overwrite), json)


# The plan -------------------------------------------------------------------------------------------------------------


def _plan(
    operations: list[str],
    models: list[str],
    inputs: str | None,
    lengths: list[int],
    mode: Mode,
    dtype: list[str] | None,
    words: list[str],
    baseline: str,
    device: str | None,
    threads: int | None,
    rounds: int,
    memory: bool,
    budget: float | None,
    seed: int,
) -> Plan:
    """What the command line asks for.

    Raises:
        BadParameter: A word of it means nothing.
    """
    from ..benchmarks.report.results import MODES
    from ..benchmarks.run import plan
    from ..benchmarks.run.operations import DTYPES
    from ..kernels import registry

    known = sorted(registry.operations())
    # A path needs no --model: no operation's name looks like one.
    paths = [name for name in operations if name not in known and (Path(name).suffix or "/" in name or ":" in name)]
    operations, models = [name for name in operations if name not in paths], [*models, *paths]
    check_known(operations, known, "operation", "OPERATION")
    dtypes = precisions(dtype, DTYPES, "--dtype")
    where = device or best_device()
    kind = where.partition(":")[0]
    if kind not in plan.LENGTHS:
        raise typer.BadParameter(f"{where!r} is no device to measure on: cpu, cuda or mps", param_hint="--device")
    usual = not (operations or models or lengths)
    every = [name for name in plan.FIRST if name in known] + [name for name in known if name not in plan.FIRST]
    subjects = [{"kind": "operation", "name": name} for name in (operations or ([] if models else every))]
    return plan.Plan(
        subjects=(*subjects, *(_model(source, inputs) for source in models)),
        lengths=tuple(sorted(set(lengths or plan.LENGTHS[kind]))),
        modes=MODES if mode is Mode.BOTH else (mode.value,),
        dtypes=tuple(dict.fromkeys(dtypes or plan.DTYPES.get(kind, ("float32",)))),
        device=where,
        words=tuple(words),
        baseline=baseline,
        rounds=rounds,
        seed=seed,
        memory=memory,
        budget=budget if budget is not None else plan.USUAL_BUDGET if usual else None,
        threads=threads,
    )


def _model(source: str, inputs: str | None) -> dict[str, Any]:
    """A model's specification: a path, or `module:factory`, which needs `--inputs`."""
    from ..errors import BadInput

    if Path(source).expanduser().exists():
        return {"kind": "model", "name": "multiflow", "source": source}
    if ":" not in source:
        raise BadInput(f"{source}: no such file or folder", "name a config.yaml, a checkpoint, or MODULE:FACTORY")
    if inputs is None:
        raise BadInput(
            f"--model {source}: what the model is called with is not known",
            "--inputs MODULE:FUNCTION names a function of a length that gives the model's arguments",
        )
    return {"kind": "model", "name": source, "source": source, "inputs": inputs}


def _folder(out: Path | None, overwrite: bool) -> Path:
    """Where the results go; it must not hold any."""
    from ..errors import BadInput

    folder = (out or Path("bench") / time.strftime("%Y-%m-%dT%H-%M-%S")).expanduser()
    if (folder / "rows.json").exists() and not overwrite:
        raise BadInput(f"{folder} holds results already", "--overwrite replaces them, another --out keeps them")
    return folder


# A run ----------------------------------------------------------------------------------------------------------------


def _measure(wanted: Plan, folder: Path, json: bool) -> None:
    from ..benchmarks.report.results import WRONG, Results, write_json
    from ..benchmarks.report.summary import headline, problems, table
    from ..benchmarks.run.plan import check_words
    from ..benchmarks.run.runner import Run
    from ..errors import BadInput

    command = shlex.join(["foldkernels", *sys.argv[1:]])
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    rows: list[Row] = []

    def so_far(run: Run, stopped: str = "") -> Results:
        return Results(tuple(rows), command, started, round(run.seconds, 1), stopped or run.stopped)

    with _progress() as told:
        bench = Run(wanted, told)
        try:
            bench.describe()
            _check_words(wanted, bench, check_words)
            folder.mkdir(
                parents=True, exist_ok=True
            )  # before the first kernel runs: a path may be one nobody can write
            _announce(wanted, bench, folder)
            for found in bench.rows():
                rows.extend(found)
                write_json(so_far(bench), folder / "rows.json")
        except KeyboardInterrupt:
            results = so_far(bench, "stopped by Ctrl-C")
            if rows:
                _write(results, folder)
                print(f"stopped: {len(results.measured())} measured rows stay in {folder}", file=sys.stderr)
            raise
        finally:
            bench.close()
    results = so_far(bench)
    written = _write(results, folder)
    if json:
        from dataclasses import asdict

        print_json({"headline": headline(results), "files": [str(path) for path in written], **asdict(results)})
    else:
        print(table(results.rows))
        print(headline(results))
        print(f"report: {written[0]}")
    _required(bench, rows)
    if not results.measured():
        told_why = "\n".join(f"  {p.subject}: {p.kernel}: {p.why}" for p in problems(rows))
        raise BadInput(f"nothing could be measured\n{told_why}".rstrip())
    if any(row.status == WRONG for row in rows):
        raise typer.Exit(1)


def _check_words(wanted: Plan, bench: Run, check: Callable[..., None]) -> None:
    from ..errors import BadInput
    from ..kernels import registry

    extra = [wanted.baseline] if wanted.baseline else []
    check([*wanted.words, *extra], bench.known, sorted(registry.operations()))
    if not any(bench.sides(known)[0] for known in bench.known):
        names = ", ".join(known.name for known in bench.known)
        raise BadInput(f"--kernel {','.join(wanted.words)} names no kernel of {names}")


def _required(bench: Run, rows: list[Row]) -> None:
    """A kernel that was required by name and never ran is an error, after everything else has been kept."""
    from ..benchmarks.report.results import UNAVAILABLE
    from ..errors import BadInput

    for known in bench.known:
        for side in sorted(bench.sides(known)[1]):
            mine = [row for row in rows if (row.subject, row.kernel) == (known.name, side)]
            if mine and all(row.status == UNAVAILABLE for row in mine):
                raise BadInput(f"{known.name}={side} is required and cannot run: {mine[0].why}")


def _announce(wanted: Plan, bench: Run, folder: Path) -> None:
    """Say what will be done, and how long it takes."""
    kernels = sum(len([s for s in bench.sides(known)[0] if not known.why.get(s)]) for known in bench.known)
    points = len(list(wanted.points()))
    about = _duration(bench.left())
    most = f", at most {_duration(wanted.budget)}" if wanted.budget is not None else ""
    lengths = ", ".join(map(str, wanted.lengths))
    models = sum(spec["kind"] == "model" for spec in wanted.subjects)
    count = [(len(bench.known) - models, "operation"), (models, "model")]
    subjects = " and ".join(f"{n} {word}{'s' if n > 1 else ''}" for n, word in count if n)
    what = f"{subjects}, {kernels} kernels that run here, L={lengths}"
    print(
        f"{what}, {points} points{' each' if len(bench.known) > 1 else ''}: about {about}{most}; results in {folder}",
        file=sys.stderr,
    )
    cores = os.cpu_count() or 1
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if wanted.device == "cpu" and busy > cores:
        words = f"other programs keep this machine busy (load {busy:.0f} on {cores} cores)"
        print(f"note: {words}: times vary, and little fits into a budget; --threads 1 suffers least", file=sys.stderr)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, float, float], None]]:
    """A bar on stderr, if that is a terminal; else a line for each operation or model as it begins."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(bar_width=24), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=1.0)
        begun = ""

        def told(what: str, done: float, left: float) -> None:
            nonlocal begun
            name, length, _ = what.partition(" L=")
            if console.is_terminal:
                about = f"about {_duration(left)} left, " if left else ""
                progress.update(task, description=about + what, completed=done)
            elif length and name != begun:
                begun = name
                print(f"{name}; about {_duration(left)} left of all", file=sys.stderr, flush=True)

        yield told


def _write(results: Results, folder: Path) -> list[Path]:
    """Every file of a run, the report first; without matplotlib there are no PNG files, and a line says so."""
    from ..benchmarks.report import plots
    from ..benchmarks.report.page import html
    from ..benchmarks.report.results import write_csv, write_json
    from ..benchmarks.report.series import figures_of, kernels_of

    report = folder / "report.page"
    report.write_text(html(results), encoding="utf-8")
    write_json(results, folder / "rows.json")
    write_csv(results.rows, folder / "rows.csv")
    files = [report, folder / "rows.json", folder / "rows.csv"]
    measured = results.measured()
    try:
        files += plots.write_plots(figures_of(measured), kernels_of(measured), folder)
    except ImportError:
        print(f"note: {plots.MISSING}", file=sys.stderr)
    return files


# Comparing ------------------------------------------------------------------------------------------------------------


def _compare(old: Path, new: Path, tolerance: float, beside_baseline: bool, any_machine: bool, json: bool) -> None:
    from ..benchmarks.report.comparison import as_dict, as_text, compare_results
    from ..benchmarks.report.results import read

    found = compare_results(read(old), read(new), tolerance, beside_baseline, any_machine)
    if json:
        print_json(as_dict(found))
    else:
        print(as_text(found))
    if found.is_worse:
        raise typer.Exit(1)
