"""A Mac without a Mac: the commands as they are called there, on tensors that say they are on MPS.

A command that starts other processes is run up to them: what they do is run here. Files, draws and the definition in
float64 are the CPU's.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from foldkernels.benchmarks.run.models import MultiflowModel
from foldkernels.benchmarks.run.operations import OperationSubject, Point
from foldkernels.benchmarks.run.worker import Answerer
from foldkernels.cli.doctor.environment_variables import OURS
from foldkernels.cli.main import main
from foldkernels.compat.multiflow.preset_comparison import compare_presets
from foldkernels.configs.presets import PRESETS
from foldkernels.kernels.registry import KernelFallbackWarning
from foldkernels.kernels.testing import isolated
from foldkernels.kernels.testing.cases.builders import SMALL
from foldkernels.kernels.testing.verification import plan, published_subjects, verify

from ..kernels.kernel_cases import operations
from ..support.goldens import MULTIFLOW, model_of
from ..support.mps import a_mac, on_mps
from .test_mps_models import some

PDB = MULTIFLOW.parent / "pdb" / "1odh.pdb"
N = 9
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Call]:
    """Runs a command in this process, on what it takes for a Mac."""
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FOLDKERNELS_CACHE", str(tmp_path / "cache"))

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    with a_mac():
        yield run


# sample, convert, explain ---------------------------------------------------------------------------------------------

TASKS = {
    "unconditional": ("--length", N, "--num", 2, "--batch-size", 2),
    "inverse_folding": ("--pdb", PDB, "--chain", "A", "--no-trajectories"),
    "forward_folding": ("--pdb", PDB, "--chain", "A", "--no-trajectories"),
}


@pytest.mark.parametrize("task", some(TASKS, ["unconditional"]))
def test_sample(task, call, tmp_path):
    """Without --device it goes to MPS, writes what it says, and the sequences that the CPU gives for the same seed."""
    words = ("sample", MULTIFLOW / "small", "--task", task, *TASKS[task], "--timesteps", 3, "--kernel", "flash")
    with on_mps():
        code, out, error = call(*words, "--out", tmp_path / "mps", "--json")
    assert code == 0, error
    report = json.loads(out)
    assert report["device"] == "mps:0" and {name.partition(": ")[2] for name in report["kernels"]} == {"torch"}
    assert all((Path(folder) / "sample.pdb").stat().st_size > 0 for folder in report["written"])
    (process,) = json.loads((tmp_path / "mps" / "run.json").read_text())["workers"]
    assert process["device"] == "mps:0"
    code, _, error = call(*words, "--out", tmp_path / "cpu", "--device", "cpu")
    assert code == 0, error
    assert (tmp_path / "mps" / "sample.fasta").read_text() == (tmp_path / "cpu" / "sample.fasta").read_text()


def test_convert(call, tmp_path):
    with on_mps(needed=False) as found:
        code, _, error = call("convert", MULTIFLOW / "small", tmp_path / "safe")
    assert code == 0, error
    assert (tmp_path / "safe" / "model.safetensors").exists() and not found.operators, "nothing goes to the GPU"


@pytest.mark.parametrize("preset", PRESETS)
def test_explain_of_a_mac(preset, call):
    """Of a typical one, and of this one; nothing falls back, and nobody is warned."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", KernelFallbackWarning)
        for where in (("--machine", "mac"), ("--device", "mps")):
            code, out, error = call("explain", MULTIFLOW / "small", *where, "--kernel", preset, "--json")
            assert code == 0, error
            wanted = "reference" if preset == "reference" else "torch"
            report = json.loads(out)
            chosen = {choice["kernel"] for choice in _choices(report)}
            assert chosen == {wanted}


def _choices(x: Any) -> Iterator[dict[str, Any]]:
    if isinstance(x, dict):
        if "kernel" in x and "operation" in x:
            yield x
        for value in x.values():
            yield from _choices(value)
    elif isinstance(x, list):
        for value in x:
            yield from _choices(value)


# verify, doctor, bench ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", some(["float32", "bfloat16"], ["float32"]))
def test_verify(precision, call):
    """Every kernel that runs on a Mac passes: on MPS, against the definition in float64 on the CPU."""
    with on_mps():
        code, out, _ = call("verify", "--length", 6, "--precision", precision, "--kernel-name", "torch", "--json")
    report = json.loads(out)
    assert code == 0, [row for row in report["checks"] if row["status"] != "passed"]
    assert report["device"] == "mps" and len(report["checks"]) > 5


@pytest.mark.parametrize("device", ["mps", pytest.param("mps:0", marks=pytest.mark.slow)])
def test_verify_of_a_checkpoint(device, call):
    """The whole model under each preset; a device that has a number is the same one."""
    words = ("--operation", "edge_transition", "--kernel-name", "torch", "--length", 6, "--json")
    with on_mps():
        code, out, error = call("verify", MULTIFLOW / "small", "--device", device, "--precision", "float32", *words)
        assert code == 0, out + error
        rows = compare_presets(model_of("small").to(device), N, presets=["torch", "flash"])
    assert [(row.preset, row.why) for row in rows if not row.passed] == []


def test_float64_is_refused_with_the_reason(call):
    for device in ("mps", "mps:0"):
        code, out, _ = call("verify", "--device", device, "--precision", "float64", "--operation", "attention")
        assert code == 1 and "MPS has no float64" in out


def test_doctor(call, monkeypatch):
    """What it does in another process is done here."""

    def here(items: Any, imports: Any, done: Any) -> list[Any]:
        rows = []
        for item in items:
            rows.append(verify(item))
            done(rows[-1])
        return rows

    monkeypatch.setattr(isolated, "verify_apart", here)
    monkeypatch.setattr("foldkernels.cli.doctor.command.LENGTH", 6)
    with on_mps():
        code, out, error = call("doctor", "--json")
    report = json.loads(out)
    assert code == 0 and report["device"] == "mps" and not report["problems"], error
    assert [row["why"] for row in report["checks"] if row["status"] not in ("passed", "no example")] == []
    assert len(report["checks"]) > 5
    assert {row["name"]: row["ok"] for row in report["toolchain"]}["MPS"] is True


@pytest.mark.parametrize(
    ("chip", "version", "well"),
    [("M1", "2.13.0", False), ("M2 Max", "2.9.1", False), ("M1 Pro", "2.14.0", True), ("M4", "2.13.0+cpu", True)],
)
def test_doctor_warns_of_training_on_an_old_pytorch(chip, version, well, monkeypatch):
    from foldkernels.cli.doctor import compilers

    monkeypatch.setattr("foldkernels.kernels.hardware.cpu.name", lambda: f"Apple {chip}")
    monkeypatch.setattr("torch.__version__", version)
    with a_mac():
        (found,) = (row for row in compilers.toolchain() if row["name"] == "MPS")
    assert found["ok"] is well and ("2.14" in found["fix"]) is not well


def test_doctor_of_macos(call, monkeypatch):
    """Where the system says that it is a Mac's, and its settings cannot be asked for."""
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    code, out, error = call("doctor", "--no-check", "--json")
    report = json.loads(out)
    assert code == 0 and not report["problems"], error
    one_pass = "edge_transition_attention"  # which pays on a CPU only
    assert not any(kernels["torch"] for name, kernels in report["kernels"].items() if name != one_pass)
    fixes = [package["fix"] for package in report["packages"].values() if package["fix"]]
    assert all("Linux only" in fix for fix in fixes)


def test_tune_has_nothing_to_do(call):
    code, out, error = call("tune")
    assert code == 0 and out.startswith("Nothing to tune on this machine's mps"), error


@pytest.mark.parametrize("operation", some(operations(), ["invariant_point_attention", "attention"]))
def test_bench_of_an_operation(operation):
    subject = OperationSubject(operation, SMALL)
    point = Point("forward+backward", 6, "float32", "mps")
    if why := subject.why_not("torch", point):
        assert "on a CPU only" in why
        pytest.skip(f"bench says of MPS: {why}")
    with on_mps():
        assert subject.check("torch", point).passed
        subject.call("torch", point)()


@pytest.mark.parametrize("dtype", some(["float32", "bfloat16"], []))
def test_bench_of_a_model(dtype):
    subject = MultiflowModel(MULTIFLOW / "small")
    point = Point("forward+backward", N, dtype, "mps")
    with on_mps():
        assert subject.check("torch", point).passed
        subject.call("torch", point)()


QUESTIONS = {
    "operation": {"kind": "operation", "name": "attention"},
    "model": {"kind": "model", "name": "multiflow", "source": str(MULTIFLOW / "small")},
}


@pytest.mark.parametrize("device", some(["mps", "mps:0"], ["mps"]))
@pytest.mark.parametrize("subject", some(QUESTIONS, ["operation"]))
def test_the_answers_of_benchs_worker(subject, device):
    """What a worker process says of MPS: which sides run, their errors, times, and what the GPU's allocator took."""
    spec = QUESTIONS[subject]
    point = {"mode": "forward+backward", "length": 12, "dtype": "float32", "device": device, "seed": 0}
    with a_mac(), on_mps():
        answerer = Answerer(lambda what: None)
        known = answerer.answer(
            {"what": "describe", "subjects": [spec], "device": device, "points": [point], "dtypes": ["float32"]}
        )
        (described,) = known["subjects"]
        sides = [side for side in described["sides"] if not described["why"][side]]
        found = answerer.answer(
            {"what": "measure", "subject": spec, "point": point, "sides": sides, "rounds": 3, "memory": True}
        )["sides"]
    assert known["one_process"] and "reference" in sides and len(sides) > 1
    for side in sides:
        assert "status" not in found[side], found[side]
        assert len(found[side]["seconds"]) == 3 and found[side]["memory_mb"] == 0.0


@pytest.mark.parametrize("subject", QUESTIONS)
def test_bench_refuses_float64_on_mps(subject):
    """On a device that has a number, too."""
    from foldkernels.benchmarks.run.worker import build

    made = build(QUESTIONS[subject])
    for device in ("mps", "mps:0"):
        with on_mps(needed=False):
            assert "MPS has no float64" in made.why_not("torch", Point("forward", 12, "float64", device))


# accelerate, train ----------------------------------------------------------------------------------------------------


def test_accelerate(call, tmp_path):
    (tmp_path / "made.py").write_text(
        "from torch import nn\nfrom tests.support.foreign import multiflow, openfold\n\n\ndef make():\n"
        "    return nn.Sequential(multiflow.ipa(), openfold.TriangleAttention())\n"
    )
    address = f"{tmp_path / 'made.py'}:make"
    with on_mps(traps=False):  # the originals' code has traps of its own
        code, out, error = call("accelerate", "--check", address, "--device", "mps", "--verify", "--json")
    assert code == 0, error
    modules = [module for module in json.loads(out)["modules"] if module["status"] == "replaced"]
    assert len(modules) == 2 and all(module["proof"]["passed"] for module in modules)


PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


@pytest.mark.parametrize("precision", some(PRECISIONS, ["32-true"]))
def test_train(precision, call, tmp_path):
    """Lightning's own strategy and precision of a Mac; two steps, resumed for a third, and the checkpoint samples."""
    pytest.importorskip("pytorch_lightning", reason="training needs pytorch-lightning")
    from ..support.training import config

    data = {"crop": 12, "sampler": {"max_batch_size": 2, "repeats": 4}, "loader": {"num_workers": 0}}
    settings = config(data={**data, "filter": {"min_num_res": 12}})
    settings["experiment"]["trainer"] |= {"precision": precision}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    words = ("train", tmp_path / "config.yaml", "--data", PDB.parent, "--out", tmp_path / "run", "--kernel", "flash")
    for steps, more in ((2, ()), (3, ("--resume",))):
        with on_mps() as found:
            code, out, error = call(*words, "--steps", steps, "--seed", 7, "--json", *more)
        assert code == 0, error
        report = json.loads(out)
        assert report["device"] == "mps:0" and report["steps"] == steps
    widths = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}
    if precision in widths:
        assert widths[precision] in found.types, "autocast was not on"
    with on_mps():
        code, _, error = call("sample", tmp_path / "run", "--length", 6, "--timesteps", 2, "--out", tmp_path / "out")
    assert code == 0, error


def test_the_work_of_verify_needs_no_list():
    """`plan` gives work for MPS, and float64 for the CPU."""
    items, rows = plan(published_subjects(), device="mps", length=6, precisions=["float32", "float64"])
    assert {item.device for item in items if item.precision == "float32"} == {"mps"}
    assert {item.device for item in items if item.precision == "float64"} == {"cpu"}
    assert any("MPS has no float64" in row.why for row in rows)
