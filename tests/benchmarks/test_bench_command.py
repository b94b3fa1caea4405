"""`foldkernels bench`: real short runs, workers that die, budgets, Ctrl-C, exit codes, and the report in a browser."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from foldkernels.benchmarks.measure import memory, timing
from foldkernels.benchmarks.report.page import html
from foldkernels.benchmarks.report.results import BACKWARD, FORWARD, Results, Row, read, write_json
from foldkernels.benchmarks.run import runner, worker
from foldkernels.benchmarks.run.operations import OperationSubject, Point
from foldkernels.benchmarks.run.plan import Plan
from foldkernels.benchmarks.run.runner import Run
from foldkernels.benchmarks.run.worker_process import OutOfTime, Worker, WorkerDied
from foldkernels.cli.main import main
from foldkernels.errors import BadInput
from foldkernels.kernels.registry import dispatch

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
ATTENTION = {"kind": "operation", "name": "attention"}


def call(capsys, *words):
    """Exit code, stdout and stderr of the command in this process."""
    capsys.readouterr()
    code = main(["bench", *map(str, words)])
    return code, *capsys.readouterr()


# Real, and short ------------------------------------------------------------------------------------------------------


def test_a_short_run_leaves_rows_a_table_a_report_and_plots(capsys, tmp_path):
    out = tmp_path / "out"
    code, printed, errors = call(
        capsys, "attention", "--length", "16,8", "--rounds", 3, "--device", "cpu", "--out", out, "--json"
    )
    assert code == 0, errors
    report = json.loads(printed)
    results = read(out)
    assert [row["ms"] for row in report["rows"]] == [row.ms for row in results.rows]
    measured = results.measured()
    assert {(row.kernel, row.mode, row.length) for row in measured} == {
        (kernel, mode, length)
        for kernel in ("reference", "torch")
        for mode in (FORWARD, BACKWARD)
        for length in (8, 16)
    }
    for row in measured:
        assert row.low_ms <= row.ms <= row.high_ms and row.rounds == 3 and row.baseline == "reference"
        assert row.error <= row.allowed_error and "masked" in row.check
        assert row.runs == (f"attention: {row.kernel}",) and row.memory_mb is not None
        assert row.machine["torch"] == torch.__version__ and row.versions["foldkernels"]
        assert row.sizes == {"h": 4, "d": 64}
    others = [row for row in results.rows if row.kernel == "flash_attn"]
    assert others and all(row.status == "unavailable" and "flash-attn" in row.why for row in others)
    assert len(list(csv.DictReader((out / "rows.csv").open()))) == len(results.rows)
    assert report["headline"] in (out / "report.page").read_text()
    assert "about" in errors and "2 kernels that run here" in errors
    # A second run does not replace the first unless it is told to.
    code, printed, errors = call(capsys, "attention", "--out", out)
    assert code == 2 and "--overwrite" in errors and read(out) == results


def answers(*questions):
    """What a worker answers, in this process; models and inputs are kept between questions."""
    answerer = worker.Answerer(lambda at: None)
    return [answerer.answer(question) for question in questions]


def measure(sides, subject=ATTENTION, length=8, mode=FORWARD, dtype="float32", **more):
    point = {"mode": mode, "length": length, "dtype": dtype, "device": "cpu", "seed": 0}
    question = {"what": "measure", "subject": subject, "sides": sides, "point": point, "rounds": 3, "memory": False}
    return {**question, **more}


def test_a_kernel_with_wrong_numbers_gets_no_time(monkeypatch):
    from foldkernels.kernels.attention import torch as kernel

    run = kernel.run
    monkeypatch.setattr(kernel, "run", lambda *x, **y: run(*x, **y) * 1.001)
    monkeypatch.setattr(dispatch, "_decided", {})
    monkeypatch.setattr(dispatch, "_loaded", type(dispatch._loaded)())
    (found,) = answers(measure(["reference", "torch"]))
    wrong = found["sides"]["torch"]
    assert wrong["status"] == "wrong" and "seconds" not in wrong and wrong["error"] > wrong["allowed_error"]
    assert "output 0: error" in wrong["why"]
    assert len(found["sides"]["reference"]["seconds"]) == 3


def test_a_kernel_that_raises_costs_its_row_only(monkeypatch):
    def fail(self, side, point):
        raise torch.OutOfMemoryError("no room") if side == "torch" else AssertionError

    real = OperationSubject.call
    monkeypatch.setattr(OperationSubject, "call", lambda s, side, p: (fail if side == "torch" else real)(s, side, p))
    (found,) = answers(measure(["torch", "reference"]))
    assert found["sides"]["torch"]["status"] == "failed" and "no room" in found["sides"]["torch"]["why"]
    assert "seconds" in found["sides"]["reference"]


def test_what_does_not_fit_into_the_time_is_not_begun():
    (found,) = answers(measure(["torch"], seconds=1e-9))
    assert found["sides"]["torch"]["status"] == "no time"
    late = time.time() - 1000.0  # as long as the process took to start
    (found,) = answers(measure(["torch"], seconds=1000.0, asked=late))
    assert found["sides"]["torch"]["status"] == "no time"
    (found,) = answers(measure(["torch"], seconds=1000.0, asked=time.time()))
    assert found["sides"]["torch"]["seconds"]


def test_kernels_are_checked_where_they_serve():
    subject = OperationSubject("attention")
    assert subject.checked_length(Point(FORWARD, 8, "float32", "cpu")) == 8
    assert subject.checked_length(Point(FORWARD, 4096, "float32", "cpu")) == 49
    assert subject.checked_length(Point(FORWARD, 4096, "float32", "cuda")) >= 129


def test_every_operation_can_be_measured():
    """At published widths, forward and backward, each kernel of plain PyTorch."""
    from foldkernels.kernels import registry

    for name in sorted(registry.operations()):
        subject, point = OperationSubject(name), Point(BACKWARD, 5, "float32", "cpu")
        sides = [side for side in subject.sides("cpu") if not subject.why_not(side, point)]
        assert sides[:2] == ["reference", "torch"], name
        for side in sides:
            assert subject.check(side, point).passed
            with registry.record_kernels() as ran:
                gradients = subject.call(side, point)()
            assert ran == subject.runs(side) and len(gradients) > 0


OWN = """
from torch import nn
import torch

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        from foldkernels.modules.triangle_multiplication import TriangleMultiplicationOutgoing
        self.layer = TriangleMultiplicationOutgoing(8)
        for p in self.parameters():
            nn.init.normal_(p, std=0.3)

    def forward(self, z, mask):
        return {"z": self.layer(z, mask), "about": "words"}

def batch(length):
    return torch.randn(1, length, length, 8), torch.ones(1, length, length)
"""


def test_a_model_of_your_own(tmp_path):
    path = tmp_path / "own_model_of_a_test.py"
    path.write_text(OWN)
    spec = {"kind": "model", "name": "own", "source": f"{path}:Model", "inputs": f"{path}:batch"}
    describe = {"what": "describe", "subjects": [spec], "device": "cpu", "dtypes": ["float32"], "points": []}
    about, found = answers(describe, measure(["original", "auto"], spec, mode=BACKWARD))
    (known,) = about["subjects"]
    assert known["sides"][0] == "original" and "auto" in known["sides"] and "torch" in known["alike"]["auto"]
    for side in ("original", "auto"):
        assert len(found["sides"][side]["seconds"]) == 3, found["sides"][side]
    assert found["sides"]["auto"]["runs"] == ["triangle_multiplication: torch"]


def test_multiflow_of_a_config_with_weights_that_are_nowhere_zero(goldens):
    spec = {"kind": "model", "name": "multiflow", "source": str(goldens / "multiflow" / "small" / "config.yaml")}
    about, found = answers(
        {"what": "describe", "subjects": [spec], "device": "cpu", "dtypes": ["float32"], "points": []},
        measure(["reference", "auto"], spec, mode=BACKWARD),
    )
    assert about["subjects"][0]["sides"][:2] == ["reference", "auto"]
    assert "invariant_point_attention: torch" in found["sides"]["auto"]["runs"]
    for side in ("reference", "auto"):
        assert 0 < found["sides"][side]["error"] <= found["sides"][side]["allowed_error"]


@pytest.mark.slow
def test_memory_is_what_a_process_of_its_own_finds():
    """One process after the other kernel's turn, against a fresh one for each."""
    from foldkernels.benchmarks.measure.fresh_process import EXACT_MEMORY
    from foldkernels.benchmarks.run.worker_process import bench_worker

    if not memory.can_reset_peak():
        pytest.skip("this system cannot reset the peak of resident memory")
    point = {"mode": FORWARD, "length": 192, "dtype": "float32", "device": "cpu", "seed": 0}

    def ask(process, side):
        spec = {"kind": "operation", "name": "edge_transition"}
        return process.ask({"what": "memory", "subject": spec, "side": side, "point": point}, 300.0)["memory_mb"]

    one = bench_worker({"GLIBC_TUNABLES": EXACT_MEMORY})
    together = {side: ask(one, side) for side in ("reference", "torch", "reference")}
    one.close()
    for side, megabytes in together.items():
        alone = bench_worker({"GLIBC_TUNABLES": EXACT_MEMORY})
        assert megabytes == pytest.approx(ask(alone, side), rel=0.1, abs=2.0)
        alone.close()
    assert together["reference"] > 4 * together["torch"]


# A worker that is told what to answer ---------------------------------------------------------------------------------


class Told:
    """Answers by the length, and moves the run's clock on by what it pretends to take."""

    def __init__(self, clock, answer=None, sides=("reference", "torch"), why=None, trial_s=0.0):
        self.clock, self.answer, self.sides, self.why = clock, answer, list(sides), why or {}
        self.trial_s = trial_s
        self.asked, self.closed = [], 0

    def ask(self, question, seconds, heard=None, limit=math.inf):
        self.asked.append(question)
        if question["what"] == "describe":
            names = [spec["name"] for spec in question["subjects"]]
            known = {"sides": self.sides, "why": self.why, "trial_s": self.trial_s, "trial_length": 32, "growth": 2.0}
            return {
                "machine": {"cpu": "told", "threads": 1},
                "versions": {"foldkernels": "0"},
                "subjects": [{**known, "name": name, "sizes": {}} for name in names],
                "one_process": True,
            }
        length = question["point"]["length"]
        takes = (length / 16) ** 2
        self.clock[0] += min(takes, limit)
        if takes > limit:
            raise OutOfTime(f"stopped after {limit:.0f} s", {"at": "checking", "side": question["sides"][0]})
        if self.answer is not None:
            special = self.answer(question)
            if special is not None:
                return special
        if question["what"] == "memory":
            return {"memory_mb": 1.5 * length}
        assert not set(question["sides"]) & set(self.why), "what can run nowhere is not asked for"
        return {"sides": {side: {"seconds": [1e-3, 2e-3, 3e-3], "calls": 1, "runs": []} for side in question["sides"]}}

    def close(self):
        self.closed += 1


def told_run(told, clock, **plan):
    given = {"subjects": (ATTENTION,), "lengths": (16, 32, 64), "modes": (FORWARD,), "memory": False, **plan}
    run = Run(Plan(**given), worker=lambda environment: told, clock=lambda: clock[0])
    run.describe()
    return run, [row for rows in run.rows() for row in rows]


def test_the_budget_leaves_out_the_longest_and_says_so():
    clock = [0.0]
    run, rows = told_run(Told(clock), clock, budget=6.0)
    assert [(row.length, row.status) for row in rows if row.kernel == "torch"] == [
        (16, "measured"),
        (32, "measured"),
        (64, "no time"),  # 1 s, then 4 s: twice that would be more than what is left
    ]
    assert "about 8 s" in rows[-1].why and "--budget" in rows[-1].why and "budget of 6 s" in run.stopped


def test_a_guess_decides_nothing_and_what_the_worker_finds_does():
    """The trial was far too slow: the shortest point is asked for all the same, and its answer decides on the rest."""
    clock = [0.0]
    slow = {"status": "no time", "why": "7 rounds would take 50 s", "once_s": 3.0}

    def answer(question):
        return {"sides": {side: dict(slow) for side in question["sides"]}} if question["what"] == "measure" else None

    told = Told(clock, answer, trial_s=100.0)
    run, rows = told_run(told, clock, budget=20.0)
    assert [question["point"]["length"] for question in told.asked[1:]] == [16]
    assert {row.status for row in rows} == {"no time"} and "about 78 s" in rows[0].why and run.stopped


def test_a_point_that_overruns_its_share_is_stopped_and_what_follows_has_its_own():
    """Whatever the machine: 64 s asked for at L=128, and 20 s there are for two subjects."""
    clock, other = [0.0], {"kind": "operation", "name": "edge_features"}
    run, rows = told_run(Told(clock), clock, subjects=(ATTENTION, other), lengths=(128, 256), budget=20.0)
    assert clock[0] <= 1.25 * 20.0 and run.left() == 0.0 and "leaves out" in run.stopped
    stopped = [row.why for row in rows if row.length == 128]
    assert stopped[0].startswith("stopped after 12 s, checking reference: its share of the 20 s") and len(stopped) == 4
    assert all(row.status == "no time" for row in rows) and len(rows) == 8


def test_a_machine_too_slow_for_all_measures_some():
    """Ten subjects have 2 s each, and each point takes 4: the first ones get theirs, the others none."""
    clock = [0.0]
    names = ["edge_transition", "edge_features", *(f"more {i}" for i in range(8))]
    subjects = tuple({"kind": "operation", "name": name} for name in names)
    _, rows = told_run(Told(clock), clock, subjects=subjects, lengths=(32, 64), budget=20.0)
    measured = [(row.subject, row.length) for row in rows if row.status == "measured" and row.kernel == "torch"]
    assert measured == [(name, 32) for name in names[:5]] and clock[0] <= 1.25 * 20.0
    assert len(rows) == 10 * 2 * 2 and {row.status for row in rows} == {"measured", "no time"}


def test_what_is_left_is_told_and_learns_from_what_was_off():
    clock, told = [0.0], []
    run = Run(
        Plan(subjects=(ATTENTION,), lengths=(16, 32, 64), modes=(FORWARD,), memory=False),
        told=lambda what, done, left: told.append((what, done, left)),
        worker=lambda environment: Told(clock, trial_s=1e-6),
        clock=lambda: clock[0],
    )
    run.describe()
    assert run.left() < 6.0  # the trial says that it is quick, and it is not
    list(run.rows())
    parts, seconds = [done for _, done, _ in told], [left for _, _, left in told]
    assert parts == sorted(parts) and seconds[-1] > seconds[0] and run.left() == 0.0
    assert told[-1][0] == "attention L=64 forward float32" and 5.0 < seconds[-1] < 25.0


def test_rounds_end_early_when_their_time_is_over():
    count = []
    samples = timing.interleave([lambda: count.append(1)] * 2, 9, [1, 1], until=0.0)
    assert [len(side) for side in samples] == [timing.LEAST_ROUNDS] * 2 and len(count) == 2 * timing.LEAST_ROUNDS


def test_each_subject_gets_its_share_of_the_budget():
    clock = [0.0]
    other = {"kind": "operation", "name": "edge_features"}
    _, rows = told_run(Told(clock), clock, subjects=(ATTENTION, other), budget=12.0)
    used_up = {"", "its share of the 0 s (--budget) was used up"}  # the first point is begun
    assert {row.why for row in told_run(Told(clock), clock, budget=1e-9)[1]} == used_up
    measured = {(row.subject, row.length) for row in rows if row.status == "measured"}
    assert measured == {("attention", 16), ("attention", 32), ("edge_features", 16), ("edge_features", 32)}


def test_medians_and_ratios_come_from_the_samples():
    clock = [0.0]

    def answer(question):
        if question["what"] == "measure":
            times = {"reference": [4e-3, 8e-3, 4e-3], "torch": [2e-3, 4e-3, 1e-3]}
            return {"sides": {side: {"seconds": times[side], "calls": 2, "runs": ["x"]} for side in question["sides"]}}
        return None

    _, (first, second) = told_run(Told(clock, answer), clock, lengths=(16,), memory=True)
    assert (first.ms, second.ms, second.low_ms, second.fastest_ms) == (4.0, 2.0, 1.5, 1.0)
    assert (first.ratio, second.ratio, second.baseline) == (1.0, 2.0, "reference")
    assert first.memory_mb == second.memory_mb == 24.0
    _, (first, second) = told_run(Told(clock, answer), clock, lengths=(16,), baseline="torch")
    assert (first.ratio, second.ratio, first.baseline) == (0.5, 1.0, "torch")


def test_a_kernel_that_takes_the_process_down_costs_its_row_only():
    clock = [0.0]

    def answer(question):
        if question["what"] == "measure" and "torch" in question["sides"]:
            raise WorkerDied("the worker died (SIGSEGV)", {"at": "warming up", "side": "torch"})
        return

    told = Told(clock, answer)
    _, (reference, torchs) = told_run(told, clock, lengths=(16,))
    assert (torchs.kernel, torchs.status) == ("torch", "failed") and "while warming up: the worker died" in torchs.why
    assert (reference.kernel, reference.status) == ("reference", "measured")
    assert [question["sides"] for question in told.asked[1:]] == [["reference", "torch"], ["reference"]]


def test_nobody_knows_who_was_running_when_they_took_turns():
    clock = [0.0]

    def answer(question):
        raise WorkerDied("no answer within 180 s", {"at": "timing", "round": 3})

    _, rows = told_run(Told(clock, answer), clock, lengths=(16,))
    assert [(row.status, row.why) for row in rows] == [("failed", "no answer within 180 s")] * 2


def test_a_worker_that_cannot_start_is_one_error():
    run = Run(
        Plan(subjects=(ATTENTION,), lengths=(8,)), worker=lambda environment: Worker([sys.executable, "-c", "1/0"])
    )
    with pytest.raises(BadInput, match=r"nothing can be measured.*ZeroDivisionError"):
        run.describe()
    run.close()


def test_a_real_worker_that_dies_says_what_it_printed():
    script = "import sys, json\nprint(json.dumps({'at': 'checking', 'side': 'x'}), flush=True)\nsys.exit('out of luck')"
    process = Worker([sys.executable, "-c", script])
    heard = []
    with pytest.raises(WorkerDied, match=r"exit status 1\): out of luck") as died:
        process.ask({}, 30.0, heard.append)
    assert died.value.at == {"at": "checking", "side": "x"} and heard == [died.value.at]
    with pytest.raises(WorkerDied, match="SIGKILL"):
        Worker([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]).ask({}, 30.0)
    talking = "import time, json\nwhile True: print(json.dumps({'at': 'x'}), flush=True); time.sleep(0.05)"
    with pytest.raises(OutOfTime, match="stopped after 1 s"):
        Worker([sys.executable, "-c", talking]).ask({}, 30.0, limit=1.0)
    hanging = Worker([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(WorkerDied, match="no answer within"):
        hanging.ask({}, 0.2)
    assert hanging.process is None


# The command, with that worker ----------------------------------------------------------------------------------------


@pytest.fixture
def tell(monkeypatch):
    """Makes the command ask a stand-in."""

    def use(answer=None, **more):
        told = Told([0.0], answer, **more)
        monkeypatch.setattr(runner, "bench_worker", lambda environment: told)
        return told

    return use


@pytest.mark.parametrize(("load", "told"), [(99.0, True), (0.0, False)])
def test_a_busy_machine_is_told(capsys, tmp_path, tell, monkeypatch, load, told):
    tell()
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    _, _, errors = call(capsys, "attention", "-l", 16, "--no-memory", "--device", "cpu", "--out", tmp_path)
    assert ("load 99 on" in errors) == told


def test_a_path_is_a_model(capsys, tmp_path, tell):
    """Without --model, beside operations; what is neither is refused with what there is."""
    config = Path(__file__).parents[2] / "examples" / "small_multiflow" / "config.yaml"
    told = tell()
    words = ("-l", 16, "--no-memory", "--device", "cpu", "--out", tmp_path)
    code, _, errors = call(capsys, "attention", config, *words)
    kinds = [(spec["kind"], spec["name"]) for spec in told.asked[0]["subjects"]]
    assert code == 0 and kinds == [("operation", "attention"), ("model", "multiflow")]
    assert errors.startswith("1 operation and 1 model, ")
    code, _, errors = call(capsys, tmp_path / "nobody.ckpt", *words)
    assert code == 2 and "no such file or folder" in errors
    code, _, errors = call(capsys, "atention", *words)
    assert code == 2 and "attention" in errors


def test_wrong_numbers_are_exit_code_1(capsys, tmp_path, tell):
    wrong = {"status": "wrong", "why": "its numbers are wrong: output 0", "check": "output 0", "error": float("nan")}
    right = {"seconds": [1e-3] * 3, "calls": 1, "runs": []}
    tell(lambda question: {"sides": {side: wrong if side == "torch" else right for side in question["sides"]}})
    words = ("attention", "-l", 16, "--no-memory", "--device", "cpu", "--out", tmp_path)
    code, printed, _ = call(capsys, *words)
    assert code == 1 and "attention: torch: wrong: its numbers are wrong: output 0" in printed
    assert "NaN" not in (tmp_path / "rows.json").read_text()  # JSON has no such word


def test_a_required_kernel_that_cannot_run_is_exit_code_2_and_the_rest_is_kept(capsys, tmp_path, tell):
    tell(sides=("reference", "torch", "fast"), why={"fast": "it needs a GPU (fix: buy one)"})
    words = ("attention", "-l", 16, "--no-memory", "--device", "cpu", "--out", tmp_path)
    code, _, errors = call(capsys, *words, "-k", "attention=fast,torch")
    assert code == 2 and "attention=fast is required and cannot run: it needs a GPU" in errors
    assert [row.kernel for row in read(tmp_path).measured()] == ["torch", "torch"]


def test_nothing_to_measure_is_exit_code_2(capsys, tmp_path, tell):
    tell(why={"reference": "no", "torch": "no, either"})
    code, _, errors = call(capsys, "attention", "-l", 16, "--device", "cpu", "--out", tmp_path)
    assert code == 2 and "nothing could be measured" in errors and "no, either" in errors


def test_ctrl_c_keeps_what_was_measured(capsys, tmp_path, tell):
    def answer(question):
        if question["point"]["length"] == 64:
            raise KeyboardInterrupt
        return

    told = tell(answer)
    code, printed, errors = call(
        capsys, "attention", "-l", "16,64", "--mode", "forward", "--no-memory", "--device", "cpu", "--out", tmp_path
    )
    assert code == 130 and printed == "" and "2 measured rows stay in" in errors and told.closed
    results = read(tmp_path)
    assert {row.length for row in results.measured()} == {16} and results.stopped == "stopped by Ctrl-C"
    assert "stopped by Ctrl-C" in (tmp_path / "report.page").read_text()


def test_without_matplotlib_there_is_a_report_and_a_line_that_says_so(capsys, tmp_path, tell, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    tell()
    code, _, errors = call(capsys, "attention", "-l", "16", "--no-memory", "--device", "cpu", "--out", tmp_path)
    assert code == 0 and "pip install 'foldkernels[plots]'" in errors
    assert "<svg" in (tmp_path / "report.page").read_text() and not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tension",), "did you mean 'attention'"),
        (("attention", "--dtype", "float23"), "did you mean 'float32'"),
        (("attention", "--length", "0"), "no whole number"),
        (("attention", "--device", "tpu"), "no device to measure on"),
        (("--model", "nowhere.yaml"), "no such file or folder"),
        (("--model", "package.module:make"), "--inputs"),
        (("--compare", "nowhere.json", "nowhere.json"), "no such file"),
    ],
)
def test_bad_input_is_one_clear_screen(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    code, printed, errors = call(capsys, *words)
    assert code == 2 and said in errors and not printed and "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_two_files_are_compared(capsys, tmp_path):
    one = {"kind": "operation", "subject": "attention", "kernel": "torch", "mode": FORWARD, "length": 64}
    one |= {"dtype": "float32", "device": "cpu", "status": "measured"}
    for name, ms in (("old", 10.0), ("new", 20.0)):
        row = Row(**one, ms=ms, low_ms=ms, high_ms=ms, machine={"cpu": "a"})
        write_json(Results((row,)), tmp_path / f"{name}.json")
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    code, printed, _ = call(capsys, "--compare", old, new)
    assert (
        code == 1 and "Slower:\n  attention torch forward L=64 float32 cpu: 2.00x the time (10 ms -> 20 ms)" in printed
    )
    assert call(capsys, "--compare", old, new, "--tolerance", 1.5)[0] == 0
    code, printed, _ = call(capsys, "--compare", new, old, "--json")
    assert code == 0 and json.loads(printed)["changes"][0]["verdict"] == "faster"


@pytest.mark.slow
def test_ctrl_c_in_a_real_run(tmp_path):
    words = ["bench", "attention", "edge_transition", "--length", "8,16,512", "--rounds", "50", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "foldkernels", *words, "--no-memory", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background is started with SIGINT ignored, and would hand that on.
        preexec_fn=lambda: (os.setpgid(0, 0), signal.signal(signal.SIGINT, signal.SIG_DFL))[0],
    )
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "rows.json").is_file() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.poll() is None, process.communicate()[1]
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers hear it, too
        printed, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in errors and "stay in" in errors and printed == ""
    assert read(tmp_path).measured() and (tmp_path / "report.page").is_file()


# The report in a browser ----------------------------------------------------------------------------------------------

LOOK = """
<script>
window.addEventListener("load", () => {
  const found = {plots: [], errors: window.problems, wide: document.documentElement.scrollWidth > innerWidth};
  for (const plot of document.querySelectorAll("svg.plot")) {
    const labels = [...plot.querySelectorAll("text.label")].map((text) => text.textContent);
    const box = plot.getBoundingClientRect();
    const inside = [...plot.querySelectorAll("text")].every((text) => {
      const b = text.getBoundingClientRect();
      return b.left >= box.left - 1 && b.right <= box.right + 1 && b.top >= box.top - 1 && b.bottom <= box.bottom + 1;
    });
    const name = plot.querySelector("title").textContent + plot.querySelector("desc").textContent;
    found.plots.push({labels, inside, name, width: box.width, ticks: plot.querySelectorAll("text.tick").length});
  }
  const table = document.querySelector("table.sortable");
  const column = [...table.querySelectorAll("th button")].findIndex((b) => b.textContent === "L");
  table.querySelectorAll("thead th button")[column].click();
  found.sorted = table.querySelectorAll("thead th")[column].getAttribute("aria-sort");
  found.lengths = [...table.tBodies[0].rows].map((row) => +row.cells[column].dataset.v);
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
});
</script>
"""
CATCH = (
    "<script>window.problems = []; window.addEventListener('error', (e) => window.problems.push(e.message));</script>"
)


@pytest.mark.slow
def test_the_report_in_a_browser(tmp_path):
    """Every plot has labelled axes inside its frame, the table sorts, nothing is fetched, the console is silent."""
    if not Path(CHROMIUM).exists():
        pytest.skip("there is no chromium here")
    from .test_bench_numbers import a_run

    page = html(a_run())
    (tmp_path / "report.page").write_text(page)
    watched = page.replace("<head>", f"<head>{CATCH}").replace("</body>", f"{LOOK}</body>")
    (tmp_path / "watched.html").write_text(watched)
    for size in ("1240,900", "420,900"):
        done = browse(tmp_path, "watched.html", "--dump-dom", f"--window-size={size}")
        found = json.loads(re.search(r"FOUND(.*)END", done.stdout)[1].replace("&lt;", "<").replace("&gt;", ">"))
        assert found["errors"] == [] and not found["wide"]
        assert len(found["plots"]) == 4
        for plot in found["plots"]:
            assert len(plot["labels"]) == 2 and all("(" in label for label in plot["labels"]), "an axis without a unit"
            assert plot["inside"] and plot["width"] > 300 and plot["ticks"] >= 4 and "grows as L" in plot["name"]
        assert found["sorted"] == "ascending" and found["lengths"] == sorted(found["lengths"])
    done = browse(tmp_path, "report.page", "--screenshot=shot.png", "--enable-logging=stderr")
    assert (tmp_path / "shot.png").stat().st_size > 20_000
    assert "CONSOLE" not in done.stderr, done.stderr


def browse(folder, page, *words):
    """Chromium without a network and without a window."""
    switches = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run".split()
    command = [CHROMIUM, *switches, f"--user-data-dir={folder / 'profile'}", *words, (folder / page).as_uri()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done
