"""The GPU suite runs, small, without a GPU; what it must not do, it does not: time a kernel that is wrong, or hang."""

from __future__ import annotations

import importlib
import json
import sys
import time
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from foldkernels.kernels.registry import dispatch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # the studies are no part of the package: they are run from the root
    sys.path.append(str(ROOT))

pytest.importorskip("einops", reason="the original formulas, which it times, use einops")
suite: Any = importlib.import_module("benchmarks.studies.gpu_suite")
subjects: Any = importlib.import_module("benchmarks.studies.gpu_subjects")
worker: Any = importlib.import_module("benchmarks.studies.gpu_worker")
Item = subjects.Item


LAYERS_ON_A_CPU = [
    "ceilings",
    "grid operation.invariant_point",
    "time operation.triangle_mult",
    "time operation.factorized_point_attention original bfloat16",
    *(f"time layer.{layer} {side} bfloat16 forward" for layer in ("triangle_multiplication", "edge_transition")
      for side in ("original", "torch")),
]  # fmt: skip
MODEL_ON_A_CPU = ["time model", "longest model"]


@pytest.mark.parametrize(
    ("words", "both"),
    [
        pytest.param(LAYERS_ON_A_CPU, ("layer.edge_transition", "layer.triangle_multiplication"), id="layers"),
        pytest.param(MODEL_ON_A_CPU, ("model",), id="model", marks=pytest.mark.slow),
    ],
)
def test_it_runs_small_on_a_cpu(words, both, tmp_path, capsys):
    """A worker, checks, rates, a grid, times beside the original formulas, the table and the plot."""
    out = tmp_path / "gpu.json"
    assert suite.main(["--quick", "--device", "cpu", "--out", str(out), "--only", *words, "--silent"]) == 0
    found = json.loads(out.read_text())
    rows = found["rows"]
    assert not [row for row in rows if "raised" in row], [row for row in rows if "raised" in row]
    assert found["machine"]["torch"] == torch.__version__
    assert not found["ceilings"] or found["ceilings"]["copy_tb_s"] > 0
    checks = [row for row in rows if row["what"] in ("check", "grid")]
    assert checks and all(row["correct"] for row in checks)
    timed = {(row["subject"], row["side"]) for row in rows if "ms" in row}
    # Factorised attention has no layer here: the original stands beside the operation itself.
    assert (("operation.factorized_point_attention", "original") in timed) == (words is LAYERS_ON_A_CPU)
    assert {(subject, side) for subject in both for side in ("original", "torch")} <= timed
    assert all(row["low_ms"] <= row["ms"] <= row["high_ms"] for row in rows if "ms" in row)
    # Nothing is timed before the check that it rests on.
    order = [(row["what"], row["subject"], row["side"]) for row in rows]
    for what, subject, side in order:
        if what == "time" and side != "original":
            assert order.index(("check", subject, side)) < order.index((what, subject, side))
    text = capsys.readouterr().out
    assert f"| {both[0]} | torch |" in text and "x |" in text
    assert out.with_suffix(".md").exists() and out.with_suffix(".png").exists()


# The parent, with a worker that is told what to answer ----------------------------------------------------------------

ABOUT = {
    "machine": {"accelerator": "a stand-in", "cpu": "", "torch": "0"},
    "kernels": {
        name: {kernel: dict.fromkeys(("bfloat16", "float32"), "") for kernel in ("reference", "triton")}
        for name in subjects.LAYERS.values()
    },
    "compiled": {name: ["triton"] for name in subjects.LAYERS.values()},
    "thresholds": dict.fromkeys(subjects.LAYERS.values(), 0),
    "presets": {"torch": [], "triton": ["invariant_point_attention: triton"]},
}


class Told:
    """A worker that needs one second for everything, by the run's own clock."""

    def __init__(self, clock: list[float], wrong: tuple[str, ...] = ()) -> None:
        self.clock, self.wrong, self.asked = clock, wrong, []

    def ask(self, item: Any, seconds: float) -> dict[str, Any]:
        self.asked.append(item)
        self.clock[0] += 1.0
        if item.what == "describe":
            return ABOUT
        if item.what in ("check", "grid"):
            right = not any(word in str(item) for word in self.wrong)
            return {"correct": right, "check": "as told"}
        if item.what == "ceilings":
            return {"copy_tb_s": 4.0, "bfloat16_tflop_s": 800.0, "tf32_tflop_s": 400.0, "float32_tflop_s": 50.0}
        if item.what == "longest":
            return {"longest": item.length}
        if item.what == "warm":
            return {"warm_s": 1.0}
        megabytes = 1e-3 * item.length**2
        return {"ms": 1.0, "low_ms": 0.9, "high_ms": 1.1, "calls": 9, "peak_mb": megabytes, "resident_mb": 100.0}

    def close(self) -> None:
        pass


def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, wrong: tuple[str, ...] = ()) -> Any:
    clock = [0.0]
    monkeypatch.setattr(suite.time, "monotonic", lambda: clock[0])
    options = Namespace(minutes=minutes, only=None, quick=False, out=tmp_path / "x.json", silent=True, jobs=1)
    run = suite.Run(options, "cpu")
    run.work = Told(clock, wrong)
    run.execute()
    return run


def test_a_red_check_gets_no_time(tmp_path, monkeypatch):
    """By the operation's check, by the grid's, by the model's; other sides of the same subject are timed."""
    wrong = ("check operation.edge_transition triton bfloat16", "grid operation.triangle_attention triton bfloat16",
             "check model triton bfloat16")  # fmt: skip
    run = told(tmp_path, monkeypatch, 1000.0, wrong)
    bad = {("edge_transition", "triton"), ("triangle_attention", "triton")}
    for item in run.work.asked:
        name = item.subject.partition(".")[2]
        if item.what in ("time", "longest") and item.precision == "bfloat16":
            assert (name, item.side) not in bad and (item.subject, item.side) != ("model", "triton"), item
    timed = {(row["subject"], row["side"], row["precision"]) for row in run.rows if "ms" in row}
    assert ("operation.edge_transition", "reference", "bfloat16") in timed
    assert ("layer.edge_transition", "triton", "tf32") in timed
    skipped = [row["skipped"] for row in run.rows if row["side"] == "triton" and "skipped" in row]
    assert skipped and all("the check is red: as told" in why for why in skipped)
    assert len(suite.wrong(run.rows)) == len(wrong)
    assert "WRONG, as told" in suite.table(json.loads(run.options.out.read_text()))


def test_the_time_is_kept_and_what_matters_comes_first(tmp_path, monkeypatch):
    run = told(tmp_path, monkeypatch, 4.0)
    asked = [item.what for item in run.work.asked]
    assert 240 <= len(asked) <= 242, "a second an item, four minutes"
    assert asked[0] == "describe" and asked.index("time") > asked.index("ceilings") > asked.index("check")
    stages = suite.plan(ABOUT, False)
    assert [stage.until for stage in stages] == sorted(stage.until for stage in stages)
    done = {(row["subject"], row["length"]) for row in run.rows if "ms" in row}
    assert ("operation.invariant_point_attention", 1024) in done and ("model", 512) in done
    left = [row for row in run.rows if row.get("skipped") == "no time left"]
    # A first call that was to compile is nothing that anybody misses.
    every = [item for stage in stages for item in stage.items if item.what != "warm"]
    assert left and len([row for row in run.rows if row["what"] != "warm"]) == len(every)
    assert len(json.loads(run.options.out.read_text())["rows"]) == len(run.rows)


def test_the_longest_chain_is_asked_from_the_peaks(tmp_path, monkeypatch):
    run = told(tmp_path, monkeypatch, 1000.0)
    found = {row["gib"]: row["length"] for row in run.rows if row["what"] == "longest" and row["side"] == "triton"}
    for gib, length in found.items():
        exact = ((gib * 2**30 - 1e8) / 1e3) ** 0.5  # a kilobyte a pair beside 100 MB
        assert 0.97 * exact <= length <= exact


def test_floors():
    """524 kflop a pair forward, as Multiflow's edge transition has; z once forward, three times in a step."""
    forward = Item("time", "operation.edge_transition", "", "bfloat16", "forward", 100)
    assert subjects.needs(forward) == (100**2 * 512, 100**2 * 524288.0)
    step = Item("time", "layer.ipa", "", "bfloat16", "step", 100)
    assert subjects.needs(step) == (3 * 100**2 * 256, 0.0)


AT_ONCE = {"fails_to_compile": "PTX codegen error", "illegal_address": "illegal memory access", "aborts": "SIGABRT",
           "hangs": "no answer within 12 s", "out_of_memory": "out of memory"}  # fmt: skip
LATER = {"illegal_address_later": "illegal memory access", "hangs_later": "no answer within 12 s"}


@pytest.mark.parametrize(
    "faults",
    [("illegal_address", "hangs_later"), pytest.param(("wrong", *AT_ONCE, *LATER), marks=pytest.mark.slow)],
    ids=["two", "all"],
)
def test_a_kernel_that_goes_wrong_costs_its_own_rows_only(faults, tmp_path, monkeypatch, capsys):
    """One that does not compile, is wrong, takes the GPU's context or the process down, hangs, or asks for too much.

    Each at once, or where it is timed only; several workers at once. The right ones are timed, every row is there.
    """
    monkeypatch.setattr(suite, "WORKER", "tests.support.faulty_gpu_worker")
    monkeypatch.setattr(suite, "ITEM_SECONDS", {"hangs": 0.0})
    monkeypatch.setattr(suite, "OTHER_SECONDS", 12.0)
    monkeypatch.setattr(suite, "START_SECONDS", 300.0)
    out = tmp_path / "gpu.json"
    words = [f"operation.edge_transition {side} bfloat16" for side in ("torch", *faults)]
    argv = ["--quick", "--device", "cpu", "--jobs", "2", "--out", str(out), "--silent", "--only", *words]
    assert suite.main(argv) == 1, "a check is red"
    rows = json.loads(out.read_text())["rows"]
    of = {(row["side"], row["what"], row["mode"]): row for row in rows}

    def say(side: str, what: str, mode: str = "step") -> str:
        return str(suite.say(of[side, what, mode]))

    assert of["torch", "check", "step"]["correct"] and of["torch", "grid", ""]["correct"]
    assert of["torch", "time", "forward"]["ms"] > 0 and of["torch", "time", "step"]["ms"] > 0
    if "wrong" in faults:
        assert "WRONG" in say("wrong", "check") and "allowed" in say("wrong", "check")
    for side in AT_ONCE.keys() & set(faults):
        assert AT_ONCE[side] in say(side, "check"), say(side, "check")
        assert "skipped" in of[side, "time", "forward"] and "skipped" in of[side, "time", "step"]
    for side in LATER.keys() & set(faults):
        assert of[side, "check", "step"]["correct"] and of[side, "grid", ""]["correct"]
        assert LATER[side] in say(side, "time", "forward") and "took its process down" in say(side, "time")
    text = capsys.readouterr().out
    assert "| operation.edge_transition | torch | bfloat16 | step |" in text


def test_longer_chains_than_one_that_ran_out_of_memory_are_not_tried(tmp_path, monkeypatch):
    class Small(Told):
        def ask(self, item: Any, seconds: float) -> dict[str, Any]:
            found = super().ask(item, seconds)
            too_long = item.what == "time" and item.side == "original" and item.length >= 512
            return {"raised": "OutOfMemoryError: CUDA out of memory."} if too_long else found

    monkeypatch.setattr(sys.modules[__name__], "Told", Small)
    run = told(tmp_path, monkeypatch, 1000.0)
    tried = {item.length for item in run.work.asked if item.what == "time" and item.side == "original"}
    assert tried == {128, 256, 512}
    assert {row["skipped"] for row in run.rows if row["side"] == "original" and row["length"] == 2048} == {
        "out of memory at L=512"
    }


# The worker -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def answering(tmp_path):
    """A parent whose worker is a script of ours."""
    made = []

    def make(script: str) -> Any:
        work = suite.Work("cpu", True)
        path = tmp_path / "script.py"
        path.write_text(script)
        work.command = [sys.executable, str(path)]
        made.append(work)
        return work

    yield make
    for work in made:
        work.close()


def test_a_worker_that_dies_costs_one_row(answering):
    work = answering("import sys\nfor line in sys.stdin:\n    sys.exit('out of luck')\n")
    first, second = (work.ask(Item("time"), 20.0) for _ in range(2))
    assert "the worker died" in first["raised"] and "out of luck" in second["raised"]


def test_a_worker_that_hangs_is_replaced(answering):
    work = answering("import time\ninput()\nprint('{}', flush=True)\ntime.sleep(60)\n")
    assert work.ask(Item("time"), 0.2)["raised"] == "no answer within 0 s"
    assert work.process is None


def test_a_gpu_that_does_not_answer_costs_the_process(answering):
    ready = "import json\ninput()\nprint('{}', flush=True)\n"
    work = answering(ready + "input()\nprint(json.dumps({'raised': 'x', 'fatal': True}), flush=True)\ninput()\n")
    assert work.ask(Item("time"), 20.0)["raised"] == "x" and work.process is None


def test_a_planted_error_is_red(monkeypatch):
    """The published widths' check sees an output that is off by a thousandth."""
    from foldkernels.kernels.edge_transition import torch as kernel

    run = kernel.run
    monkeypatch.setattr(kernel, "run", lambda *x: run(*x) * 1.001)
    monkeypatch.setattr(dispatch, "_decided", {})
    monkeypatch.setattr(dispatch, "_loaded", type(dispatch._loaded)())
    found = worker.Worker("cpu", True).do(Item("check", "operation.edge_transition", "torch", "float32", "step", 9))
    assert not found["correct"] and "plain PyTorch" in found["check"]


def test_what_an_item_raises_is_its_answer():
    found = worker.answer(worker.Worker("cpu", True), Item("time", "operation.edge_transition", "nobody", "float32"))
    assert "no kernel 'nobody'" in found.get("skipped", "")
    found = worker.answer(worker.Worker("cpu", True), Item("time", "operation.nothing", "torch", "float32", length=4))
    assert found["raised"].startswith("NoExample") and asdict(Item("time"))["what"] == "time"


class Event:
    """A CUDA event by the clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A worker that takes the CPU for a GPU of 80 GiB: what it asks of CUDA is answered by stand-ins."""
    about = SimpleNamespace(
        total_memory=80 * 2**30, major=9, minor=0, multi_processor_count=132, L2_cache_size=50_000_000
    )
    shares: list[float] = []
    answers: dict[str, Any] = {
        "Event": Event, "synchronize": lambda: None, "empty_cache": lambda: None, "memory_allocated": lambda: 1_000_000,
        "reset_peak_memory_stats": lambda: None, "max_memory_allocated": lambda: 3_000_000,
        "get_device_properties": lambda _: about, "set_per_process_memory_fraction": shares.append,
    }  # fmt: skip
    for name, stand_in in answers.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(worker, "FLUSHED", 16)
    made = worker.Worker("cpu", True)
    made.cuda, made.shares = True, shares
    return made


def test_what_is_asked_of_a_gpu(on_a_gpu, monkeypatch):
    """Times by events, memory by the allocator, the longest chain under a smaller GPU's share."""
    found = on_a_gpu.do(Item("time", "operation.edge_transition", "torch", "float32", "step", 8))
    assert found["ms"] > 0 and found["peak_mb"] == 2.0 and found["resident_mb"] == 1.0
    assert on_a_gpu._gpu()["capability"] == "9.0"
    real, lengths = on_a_gpu._once, []

    def once(item: Any, length: int) -> None:
        lengths.append(length)
        if length > 12:
            raise torch.cuda.OutOfMemoryError("as told")
        real(item, length)

    monkeypatch.setattr(on_a_gpu, "_once", once)
    item = Item("longest", "operation.edge_transition", "torch", "float32", "forward", 14, gib=40.0)
    assert on_a_gpu.do(item) == {"longest": 12, "tried": [14, 13, 12]} and lengths == [14, 13, 12]
    assert on_a_gpu.shares == [0.5, 1.0]
    assert worker.answer(on_a_gpu, replace(item, length=99))["raised"].startswith("none of [99, 94, ")
