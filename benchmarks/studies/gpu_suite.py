"""Every kernel on this GPU: right or wrong, how fast beside the original formulas and the hardware, how much memory.

    python -m benchmarks.studies.gpu_suite                     nine minutes on a GPU: JSON, table, plot
    python -m benchmarks.studies.gpu_suite --minutes 4         the most important first; what is not reached is named
    python -m benchmarks.studies.gpu_suite --only layer.ipa    items whose name holds this, and their checks
    python -m benchmarks.studies.gpu_suite --jobs 4            so many processes check and compile at once
    python -m benchmarks.studies.gpu_suite --quick             everything once, small, also on a CPU: does it run
    python -m benchmarks.studies.gpu_suite --render FILE       the table and the plot again, from the JSON

Run from the repository's root, with `foldkernels` importable. On a machine that has PyTorch and Triton but neither a
network nor this project, carry the wheels that are missing (6 MB for Python 3.12), and make the checkout importable
under its name:

    python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \\
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \\
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \\
        -d .whl pydantic==2.14.3 pydantic-core==2.50.4 annotated-types typing-inspection typing-extensions \\
        omegaconf roma gemmi
    python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl \\
        && ln -sfn "$PWD" /tmp/site/foldkernels
    PYTHONPATH=/tmp/site python3 -u -m benchmarks.studies.gpu_suite --minutes 8.5 --out "${OUT:-.}/gpu.json"

Those of other projects are 74 MB more: cuequivariance, cuequivariance-torch, platformdirs, trifast,
cuequivariance-ops-torch-cu13 (29 MB) and cuequivariance-ops-cu13 (45 MB). Where what may be carried at once is less,
carry them in calls before, the largest in parts (`split -b 20m`, there `cat`), while the machine is kept.

Order: first, several processes at once, what needs no quiet machine: every kernel of every operation against float64,
forward and all gradients, at the published widths, and the contract's grid thinned; layers and the model; and one call
of whatever is timed later, so that Triton compiles it now. IPA and the edge transition in bfloat16 come first. Then the
hardware's own rates, and times, one after the other: IPA and edge transition, the model, the longest chain that fits in
40 and in 80 GiB, the model at other lengths, the rest. Each stage may use its share of the time; what it leaves comes
last. A kernel whose check is red, or was not reached, gets no time; one that hangs or takes the GPU's context down
costs its own process and its own row, and is not run again; one that ran out of memory is not tried with longer chains.
The rows are written after each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from foldkernels.benchmarks.run.worker_process import Worker, WorkerDied

from .gpu_subjects import LAYERS, ORIGINALS, ROOT, Item, needs

LENGTHS = (512, 1024, 256, 128, 2048)
CHECKED, MODEL_CHECKED = 129, 64
MEMORY_GIB = (40.0, 80.0)
#: Operations in the order of their importance; those that are not named here follow.
FIRST = ("invariant_point_attention", "edge_transition", "factorized_point_attention", "triangle_attention",
         "triangle_multiplication", "attention_pair_bias")  # fmt: skip
#: The longest that an item may take: a check and a first call compile, beside others that do.
ITEM_SECONDS = {"check": 120.0, "grid": 150.0, "warm": 90.0, "longest": 45.0}
OTHER_SECONDS = 30.0
START_SECONDS = 60.0
#: How far what was begun may run beyond its stage, where several run at once.
GRACE_SECONDS = 20.0
#: At most so many processes at once: each holds half a gigabyte of the GPU, and compiles on a core of its own.
MOST_JOBS = 14
#: What is started with `python -m`.
WORKER = "benchmarks.studies.gpu_worker"
#: The length at which everything is called once before it is timed: like all timed ones a multiple of 128.
WARM = 512

Row = dict[str, Any]
NOT_CHECKED: Row = {"skipped": "not checked"}


@dataclass
class Stage:
    """Items that belong together, and the share of all time by which they should be done."""

    name: str
    until: float
    items: list[Item] = field(default_factory=list)
    together: bool = False  # several at once: nothing in it is timed


# The worker -----------------------------------------------------------------------------------------------------------


class Work(Worker):
    """A worker process, started when it is needed and replaced when it dies or hangs."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.quick = device, quick
        command = [sys.executable, "-m", WORKER, device, "quick" if quick else "full"]
        # Several of them share the cores; what they do there is to draw inputs and to compile.
        super().__init__(command, {"OMP_NUM_THREADS": "4"} if device == "cuda" else {}, folder=ROOT)

    def ask(self, item: Item, seconds: float) -> Row:  # type: ignore[override]
        """What the worker answers; `raised` and `fatal` where it does not. Its start has a limit of its own."""
        try:
            if self.process is None or self.process.poll() is not None:
                super().ask(asdict(Item("ready")), START_SECONDS)
            found = super().ask(asdict(item), seconds)
        except WorkerDied as died:
            return {"raised": str(died), "fatal": True}
        if found.get("fatal"):
            self.close()
        return found


# The plan -------------------------------------------------------------------------------------------------------------


def plan(about: Mapping[str, Any], quick: bool) -> list[Stage]:
    """Every item in the order in which it is done."""
    kernels: Mapping[str, Mapping[str, Mapping[str, str]]] = about["kernels"]
    edges: Mapping[str, int] = about["thresholds"]
    names = [name for name in FIRST if name in kernels] + sorted(kernels.keys() - set(FIRST))
    lengths, checked, model_checked = ((16,), 9, 12) if quick else (LENGTHS, CHECKED, MODEL_CHECKED)

    def sides(name: str, precision: str) -> list[str]:
        own = "float32" if precision == "tf32" else precision
        return [kernel for kernel, why in kernels[name].items() if not why[own]]

    compiled: Mapping[str, Sequence[str]] = about["compiled"]
    warm = 16 if quick else WARM

    def checks(some: Sequence[str], precision: str) -> list[Item]:
        """Operations at the published widths, the grid, and a first call of what compiles."""
        found: dict[str, list[Item]] = {"check": [], "warm": [], "grid": []}
        for name in some:
            length = checked if quick else max(checked, edges[name])
            own = [side for side in sides(name, precision) if side in compiled[name]]
            for side in (*own, *(side for side in sides(name, precision) if side not in own)):
                subject = f"operation.{name}"
                found["check"].append(Item("check", subject, side, precision, "step", length))
                found["grid"].append(Item("grid", subject, side, precision, ""))
                if side in own:
                    found["warm"].append(Item("warm", subject, side, precision, "step", warm))
        return [*found["check"], *found["warm"], *found["grid"]]

    def times(subjects: Sequence[str], precisions: Sequence[str], lengths: Sequence[int]) -> Iterator[Item]:
        for length in lengths:
            for subject in subjects:
                kind, _, name = subject.partition(".")
                for precision in precisions:
                    of_layer = ["original", *sides(LAYERS.get(name, name), precision)]
                    ours = of_layer if kind == "layer" or name in ORIGINALS else of_layer[1:]
                    for mode in ("forward", "step"):
                        # The definition holds everything at once: no time for it but where it is a minute's work.
                        some = [side for side in ours if side != "reference" or length <= 512]
                        yield from (Item("time", subject, side, precision, mode, length) for side in some)

    def layer_checks(layers: Sequence[str], precision: str) -> list[Item]:
        found = []
        for name in layers:
            for side in sides(LAYERS[name], precision):
                found.append(Item("check", f"layer.{name}", side, precision, "step", model_checked))
                if side in compiled[LAYERS[name]]:
                    found.append(Item("warm", f"layer.{name}", side, precision, "step", warm))
        return found

    def model_checks(precision: str) -> list[Item]:
        found = [Item("check", "model", word, precision, "step", model_checked) for word in words]
        ours = [word for word in words if word != "torch"]
        return found + [Item("warm", "model", word, precision, "step", warm) for word in ours]

    main = ("ipa", "edge_transition")
    rest = tuple(name for name in LAYERS if name not in main)
    words = list(about["presets"])
    models = ["original", *words]

    def whole_model(precision: str, lengths: Sequence[int], modes: Sequence[str]) -> list[Item]:
        points = [(length, mode) for length in lengths for mode in modes]
        return [Item("time", "model", side, precision, mode, length) for length, mode in points for side in models]

    longest = [
        Item("longest", "model", side, "bfloat16", mode, gib=gib)
        for gib in MEMORY_GIB
        for mode in ("forward", "step")
        for side in models
    ]
    main_operations = [f"operation.{name}" for name in names[:3]]
    rest_operations = [f"operation.{name}" for name in names[3:]]
    main_layers, rest_layers = [f"layer.{name}" for name in main], [f"layer.{name}" for name in rest]
    mains, others = names[:3], names[3:]
    return [
        Stage(
            "checks",
            0.4,
            [
                *checks(mains[:2], "bfloat16"),
                *layer_checks(main, "bfloat16"),
                *model_checks("bfloat16"),
                *checks(mains[2:], "bfloat16"),
                *checks(mains, "float32"),
                *model_checks("tf32"),
                *checks(others, "bfloat16"),
                *checks(others, "float32"),
                *layer_checks(rest, "bfloat16"),
                *layer_checks(main, "tf32"),
            ],
            together=True,
        ),
        Stage("the hardware", 0.42, [Item("ceilings")]),
        Stage(
            "IPA and edge transition",
            0.6,
            [
                *times(main_operations, ("bfloat16",), lengths[:2]),
                *times(main_layers, ("bfloat16",), lengths[:2]),
            ],
        ),
        Stage("model", 0.74, whole_model("bfloat16", lengths[:2], ("forward", "step", "sample"))),
        Stage("memory", 0.84, longest),
        Stage(
            "model at other lengths",
            0.94,
            [
                *whole_model("bfloat16", lengths[2:], ("forward", "step", "sample")),
                *whole_model("tf32", lengths[:2], ("forward", "step")),
            ],
        ),
        Stage(
            "the rest",
            1.0,
            [
                *times(rest_operations + rest_layers, ("bfloat16",), lengths[:1]),
                *times(main_operations + main_layers, ("bfloat16",), lengths[2:]),
                *times(main_layers, ("tf32",), lengths[:2]),
                *times(main_operations, ("float32",), lengths[:2]),
                *times(rest_operations + rest_layers, ("bfloat16",), lengths[1:4]),
            ],
        ),
    ]


def must_hold(item: Item) -> list[tuple[str, str, str]]:
    """The subject, side and precision of the checks without which an item gets no time."""
    keys = [(item.subject, item.side, item.precision)]
    kind, _, name = item.subject.partition(".")
    if kind == "layer":
        keys.append((f"operation.{LAYERS[name]}", item.side, "float32" if item.precision == "tf32" else item.precision))
    return keys


def chosen(stages: Sequence[Stage], words: Sequence[str]) -> list[Stage]:
    """The stages with the items that hold one of the words, and the checks that those rest on."""

    def said(item: Item) -> bool:
        return any(word in str(item) for word in words)

    rests_on = {key for stage in stages for item in stage.items if said(item) for key in must_hold(item)}
    items = [item for stage in stages for item in stage.items if said(item) and item.what == "time"]
    timed = {(item.subject, item.side, item.precision) for item in items}
    return [
        replace(
            stage,
            items=[
                item
                for item in stage.items
                if (said(item) and item.what != "warm")
                or (item.what == "check" and (item.subject, item.side, item.precision) in rests_on)
                or (item.what == "warm" and (item.subject, item.side, item.precision) in timed)
            ],
        )
        for stage in stages
    ]


def fits(rows: Sequence[Row], item: Item) -> int:
    """The length that should fit in `item.gib`: peaks grow with the square of the length, as two of them tell."""
    peaks = {}
    for row in rows:
        same = all(row.get(name) == getattr(item, name) for name in ("subject", "side", "precision", "mode"))
        if same and row["what"] == "time" and "peak_mb" in row:
            peaks[row["length"]] = 1e6 * (row["peak_mb"] + row["resident_mb"])
    if len(peaks) < 2:
        return 0
    short, long = sorted(peaks)[-2:]
    slope = (peaks[long] - peaks[short]) / (long**2 - short**2)
    free = item.gib * 2**30 - (peaks[long] - slope * long**2)
    return int(math.sqrt(max(0.0, free) / slope)) if slope > 0 else 0


# A run ----------------------------------------------------------------------------------------------------------------


class Run:
    """One run of the suite: what was found so far, and what may still be done."""

    def __init__(self, options: argparse.Namespace, device: str) -> None:
        self.options, self.started = options, time.monotonic()
        self.work = Work(device, options.quick)
        self.rows: list[Row] = []
        self.lines: list[str] = []  # the rows as they are written
        self.red: dict[tuple[str, str, str], str] = {}
        self.checked: set[tuple[str, str, str]] = set()
        self.down: set[tuple[str, str, str]] = set()  # what took its process down
        #: Subject, side, precision and mode -> the shortest chain that ran out of memory.
        self.too_long: dict[tuple[str, str, str, str], int] = {}
        self.about: dict[str, Any] = {}
        self.ceilings: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def execute(self) -> None:
        """Do what the time allows, and name what it does not."""
        whole = 60.0 * self.options.minutes
        self.about = self.work.ask(Item("describe"), 180.0)
        if "raised" in self.about:
            raise SystemExit(f"the suite cannot start: {self.about['raised']}")
        later: list[Item] = []
        for stage in chosen(plan(self.about, self.options.quick), self.options.only or [""]):
            if stage.together:
                # What a first call was to compile is compiled by the call that is timed.
                later += [item for item in self.at_once(stage.items, stage.until * whole) if item.what != "warm"]
                continue
            for item in stage.items:
                # What waits for a check that waits comes after it.
                if self.seconds > stage.until * whole or self.refused(item) == NOT_CHECKED:
                    later.append(item)
                    continue
                self.do(item, whole)
        for i, item in enumerate(later):
            if self.seconds > whole:
                self.rows += [{**asdict(item), "skipped": "no time left"} for item in later[i:]]
                self.write()
                break
            self.do(item, whole)
        self.work.close()

    def at_once(self, items: Sequence[Item], until: float) -> list[Item]:
        """Do items in several processes; those that the time did not allow."""
        waiting, left, lock = deque(items), list[Item](), threading.Lock()

        def serve(work: Any) -> None:
            while True:
                with lock:
                    if not waiting or self.seconds > until:
                        return
                    item = waiting.popleft()
                    refused = self.refused(item)
                if refused:
                    row = refused
                else:
                    may_take = ITEM_SECONDS.get(item.what, OTHER_SECONDS)
                    granted = min(may_take, max(1.0, until + GRACE_SECONDS - self.seconds))
                    row = work.ask(item, granted)
                    if granted < may_take and row.get("raised", "").startswith("no answer"):
                        # The stage's end, and no fault of the kernel's, as far as can be told.
                        with lock:
                            left.append(item)
                        continue
                with lock:
                    self.note(item, {**asdict(item), **row})

        jobs = max(1, min(self.options.jobs, len(items)))
        if jobs == 1:
            serve(self.work)
        else:
            workers = [Work(self.work.device, self.work.quick) for _ in range(jobs)]
            threads = [threading.Thread(target=serve, args=(work,), daemon=True) for work in workers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for work in workers:
                work.close()
        return [*left, *waiting]

    def do(self, item: Item, whole: float) -> None:
        """One item, and its row."""
        row: Row = {**asdict(item), **self.refused(item)}
        if item.what == "longest" and "skipped" not in row:
            row["length"] = length = int(0.98 * fits(self.rows, item))
            item = replace(item, length=length)
            row |= {} if length else {"skipped": "two lengths must have been timed"}
        if "skipped" not in row:
            left = max(5.0, whole - self.seconds) + 5.0
            row |= self.work.ask(item, min(ITEM_SECONDS.get(item.what, OTHER_SECONDS), left))
        self.note(item, row)

    def note(self, item: Item, row: Row) -> None:
        """Keep a row, and what it says about those that follow."""
        if item.what == "ceilings":
            self.ceilings = {name: value for name, value in row.items() if name.endswith("_s")}
        key = (item.subject, item.side, item.precision)
        if row.get("fatal") and item.side != "original":
            self.down.add(key)  # it would do so again, and each time cost a process
        if item.what in ("check", "grid"):
            if row.get("correct"):
                self.checked.update({key} if item.what == "check" else set())
            elif "skipped" not in row:
                self.red[key] = f"the check is red: {row.get('check') or row.get('raised')}"
        elif row.get("fatal") and item.side != "original":
            self.red.setdefault(key, f"it took its process down: {row['raised']}")
        elif "out of memory" in row.get("raised", "").lower():
            self.too_long.setdefault((*key, item.mode), item.length)
        if item.what == "time" and "ms" in row:
            row |= self.floor(item, row["ms"])
        self.rows.append({**row, "at_s": round(self.seconds, 1)})
        self.write()
        if not self.options.silent:
            print(f"{self.seconds:6.1f} s  {item}: {say(row)}", flush=True)

    def refused(self, item: Item) -> Row:
        """Why an item is not done: its kernel is wrong, or nobody has looked."""
        key = (item.subject, item.side, item.precision)
        most = self.too_long.get((*key, item.mode))
        if item.what == "time" and most is not None and item.length >= most:
            return {"skipped": f"out of memory at L={most}"}
        if item.what in ("check", "grid") and key in self.down:
            return {"skipped": self.red[key]}
        if item.what not in ("time", "longest", "warm") or item.side == "original":
            return {}
        # A model's kernels are checked by its own check; where one of them is red by itself, so is the model.
        parts = [words.split(": ") for words in self.about["presets"].get(item.side, ()) if item.subject == "model"]
        wide = "float32" if item.precision == "tf32" else item.precision
        for red in (*must_hold(item), *((f"operation.{name}", kernel, wide) for name, kernel in parts)):
            if red in self.red:
                return {"skipped": self.red[red]}
        unknown = item.what != "warm" and any(needed not in self.checked for needed in must_hold(item))
        return NOT_CHECKED if unknown else {}

    def floor(self, item: Item, ms: float) -> Row:
        """The time below which this hardware cannot do it, and how far above that it is."""
        moved, done = needs(item)
        if not self.ceilings or not (moved or done):
            return {}
        floors = {
            "bytes": moved / (1e9 * self.ceilings["copy_tb_s"]),
            "operations": done / (1e9 * self.ceilings[f"{item.precision}_tflop_s"]),
        }
        by = max(floors, key=floors.__getitem__)
        return {"floor_ms": floors[by], "floor_by": by, "above_floor": ms / floors[by]}

    def write(self) -> None:
        """All of it, in one step: a run that is killed leaves whole rows."""
        path: Path = self.options.out
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines += [json.dumps(row) for row in self.rows[len(self.lines) :]]
        head = json.dumps({**self.about, "ceilings": self.ceilings, "minutes": self.options.minutes})[:-1]
        part = path.with_suffix(".part")
        part.write_text(f'{head}, "rows": [\n' + ",\n".join(self.lines) + "\n]}\n")
        os.replace(part, path)


# Words ----------------------------------------------------------------------------------------------------------------


def say(row: Row) -> str:
    """What came of an item, in a line."""
    for name in ("raised", "skipped"):
        if name in row:
            return f"{name}: {row[name]}"
    if "ms" in row:
        floor = f", {row['above_floor']:.2f} x the floor ({row['floor_by']})" if "above_floor" in row else ""
        peak = f", {row['peak_mb']:,.0f} MB" if "peak_mb" in row else ""
        return f"{row['ms']:.3f} ms ({row['low_ms']:.3f} to {row['high_ms']:.3f}){floor}{peak}"
    if "longest" in row:
        return f"L = {row['longest']}"
    if "warm_s" in row:
        return f"compiled and called, {row['warm_s']:.1f} s"
    if "correct" in row:
        again = "" if row.get("repeatable", True) else ", differs from run to run"
        return ("right" if row["correct"] else "WRONG") + f", {row['check']}{again}"
    return ", ".join(f"{name} {value:.3g}" for name, value in row.items() if name.endswith("_s"))


def wrong(rows: Sequence[Row]) -> list[Row]:
    """The checks that are red."""
    checks = [row for row in rows if row["what"] in ("check", "grid") and "skipped" not in row]
    return [row for row in checks if not row.get("correct")]


def baseline(rows: Sequence[Row], row: Row) -> Row | None:
    """The original formulas beside a row; for an operation alone, those of its layer."""
    layer = {f"operation.{operation}": f"layer.{name}" for name, operation in LAYERS.items()}
    subject = (
        row["subject"] if row["subject"].partition(".")[2] in ORIGINALS else layer.get(row["subject"], row["subject"])
    )
    for other in rows:
        if other["subject"] != subject or other["side"] != "original" or not {"ms", "longest"} & other.keys():
            continue
        names = ("what", "precision", "mode", "gib") if "longest" in row else ("what", "precision", "mode", "length")
        if all(other[name] == row[name] for name in names):
            return other
    return None


def table(found: Mapping[str, Any]) -> str:
    """Markdown: what is wrong, the times, the longest chains, what was not done."""
    rows: list[Row] = found["rows"]
    where, rates = found["machine"], found.get("ceilings") or {}
    checks = [row for row in rows if row["what"] in ("check", "grid") and "skipped" not in row]
    red = wrong(rows)
    lines = [
        f"{where['accelerator'] or where['cpu']}, torch {where['torch']}, triton {where.get('triton', '')}; "
        + ", ".join(f"{name.removesuffix('_s').replace('_', ' ')}/s {value:.3g}" for name, value in rates.items()),
        "",
        f"{len(checks) - len(red)} of {len(checks)} checks against float64 are right.",
        *(f"- **{row['subject']} {row['side']} {row['precision']}** ({row['what']}): {say(row)}" for row in red),
        "",
        "| what | side | precision | pass | L | ms | 20% to 80% | of the original | of the floor | extra MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    timed = [row for row in rows if "ms" in row]
    for row in sorted(timed, key=lambda row: (row["subject"], row["precision"], row["mode"], row["length"], row["ms"])):
        other = baseline(rows, row)
        cells = [
            row["subject"], row["side"], row["precision"], row["mode"], str(row["length"]), f"{row['ms']:.3f}",
            f"{row['low_ms']:.3f} to {row['high_ms']:.3f}",
            f"{other['ms'] / row['ms']:.2f}x" if other else "",
            f"{row['above_floor']:.2f} ({row['floor_by']})" if "above_floor" in row else "",
            f"{row['peak_mb']:,.0f}" if "peak_mb" in row else "",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    longest = [row for row in rows if "longest" in row]
    if longest:
        lines += ["", "| longest chain | precision | pass | GiB | L | of the original |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        for row in longest:
            other = baseline(rows, row)
            ratio = f"{row['longest'] / other['longest']:.2f}x" if other else ""
            cells = [row["side"], row["precision"], row["mode"], f"{row['gib']:g}", str(row["longest"]), ratio]
            lines.append(f"| {' | '.join(cells)} |")
    names = [field.name for field in fields(Item)]
    failed = [row for row in rows if "raised" in row and row["what"] not in ("check", "grid")]
    lines += ["", *(f"- failed: {Item(**{name: row[name] for name in names})}: {row['raised']}" for row in failed)]
    skipped = [row for row in rows if "skipped" in row]
    if skipped:
        reasons: dict[str, int] = {}
        for row in skipped:
            reasons[row["skipped"]] = reasons.get(row["skipped"], 0) + 1
        lines += ["", *(f"- {count} not done: {why}" for why, count in reasons.items())]
    return "\n".join(lines)


def plot(found: Mapping[str, Any], path: Path) -> bool:
    """Times over lengths, one panel for each subject and pass under bfloat16; False where nothing can be drawn."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in found["rows"] if "ms" in row and row["precision"] == "bfloat16"]
    panels = sorted({(row["subject"], row["mode"]) for row in timed})
    if not panels:
        return False
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(4 * columns, 3.2 * lines), squeeze=False)
    for axis, (subject, mode) in zip(axes.flat, panels, strict=False):
        some = [row for row in timed if (row["subject"], row["mode"]) == (subject, mode)]
        for side in sorted({row["side"] for row in some}):
            points = sorted((row["length"], row["ms"]) for row in some if row["side"] == side)
            axis.plot(*zip(*points, strict=True), marker="o", label=side)
        floors = sorted({(row["length"], row["floor_ms"]) for row in some if "floor_ms" in row})
        if floors:
            axis.plot(*zip(*floors, strict=True), "k--", label="floor")
        axis.set(title=f"{subject} {mode}", xlabel="residues", ylabel="ms", xscale="log", yscale="log")
        axis.legend(fontsize=7)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def show(path: Path) -> int:
    """Print the table of a file, and write it and the plot beside it."""
    found = json.loads(path.read_text())
    text = table(found)
    path.with_suffix(".md").write_text(text + "\n")
    drawn = plot(found, path.with_suffix(".png"))
    print(text)
    print(f"\nrows: {path}" + (f", plot: {path.with_suffix('.png')}" if drawn else ""))
    return int(bool(wrong(found["rows"])))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite; 1 where a check is red."""
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.5, help="the time to use (8.5)")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only items whose name holds one of these")
    parser.add_argument("--quick", action="store_true", help="one short length: does it run")
    parser.add_argument("--jobs", type=int, help="processes that check and compile at once; the cores, 14 at most")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is one")
    parser.add_argument("--out", type=Path, help="the JSON; benchmarks/studies/results/gpu_<name>.json")
    parser.add_argument("--silent", action="store_true", help="print the table only")
    parser.add_argument("--render", type=Path, metavar="FILE", help="measure nothing: table and plot of a JSON file")
    options = parser.parse_args(argv)
    if options.render:
        return show(options.render)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and not options.quick:
        print("there is no GPU here; --quick runs the suite small, on the CPU", file=sys.stderr)
        return 2
    if options.out is None:
        name = torch.cuda.get_device_name().replace(" ", "_").lower() if device == "cuda" else "cpu"
        options.out = ROOT / "benchmarks" / "studies" / "results" / f"gpu_{name}.json"
    if options.jobs is None:
        options.jobs = max(1, min(MOST_JOBS, (os.cpu_count() or 2) - 2))
    run = Run(options, device)
    try:
        run.execute()
    finally:
        run.work.close()
    return show(options.out)


if __name__ == "__main__":
    sys.exit(main())
