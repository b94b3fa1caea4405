"""The baseline computes what the original computes, and the harness around it measures what it says."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from foldkernels.compat.multiflow.checkpoint.files import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens" / "multiflow"
if str(ROOT) not in sys.path:  # benchmarks/ is no part of the package: it is run from the root, and imported from there
    sys.path.append(str(ROOT))

pytest.importorskip("einops", reason="the original formulas use einops")
measure: Any = importlib.import_module("benchmarks.studies.rows")
multiflow_cpu: Any = importlib.import_module("benchmarks.studies.multiflow_cpu")
original_formulas: Any = importlib.import_module("benchmarks.studies.original_formulas")

# What an honest float32 implementation may differ by, from the goldens' README: Angstrom, none, none.
MODEL_TOLERANCE = {"pred_trans": 1e-4, "pred_rotmats": 2e-5, "pred_logits": 5e-5}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Rows set the number of threads; the other tests should not feel it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def part(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of a golden file that start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}


# ---------------------------------------------------------------------------------------------------- the baseline


@pytest.mark.parametrize("case", ["ipa_small_L17", "ipa_small_L33"])
def test_attention_equals_the_original_with_all_gradients(case: str) -> None:
    path = GOLDENS / "ipa" / f"{case}.safetensors"
    golden = load_file(path)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["ipa_cfg"])
    layer = original_formulas.InvariantPointAttention(config)
    layer.load_state_dict(part(golden, "w."), strict=True)
    inputs = part(golden, "in.")
    leaves = {name: inputs[name].requires_grad_() for name in ("s", "z", "trans", "rotmats")}
    valid = inputs["mask"] > 0.5

    def run(attention_mask: Tensor | None) -> Tensor:
        frames = original_formulas.Frames(leaves["rotmats"], leaves["trans"])
        out: Tensor = layer(leaves["s"], leaves["z"], frames, inputs["mask"], attention_mask)
        return out

    restricted = run(inputs["attention_mask"])
    torch.testing.assert_close(restricted[valid], golden["out_attention_mask"][valid], atol=1e-5, rtol=0)
    out = run(None)
    torch.testing.assert_close(out[valid], golden["out"][valid], atol=1e-5, rtol=0)
    torch.autograd.backward((out * inputs["loss_w"]).sum())
    parameters = {f"gradw.{name}": parameter for name, parameter in layer.named_parameters()}
    inner = {**{f"grad.{name}": leaf for name, leaf in leaves.items()}, **parameters}
    for name, gradient in golden.items():
        if name.startswith(("grad.", "gradw.")):
            error = float((inner[name].grad - gradient).abs().max())
            assert error <= 3e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("size", ["small", "small_chain"])
def test_the_model_equals_the_original(size: str) -> None:
    checkpoint = read_checkpoint(GOLDENS / size / "last.ckpt")
    model = original_formulas.FlowModel(OmegaConf.to_container(checkpoint.config.model, resolve=True)).eval()
    model.load_state_dict(checkpoint.state_dict, strict=True)
    cases = sorted((GOLDENS / size).glob("case_*.safetensors"))
    assert cases
    for case in cases:
        golden = load_file(case)
        batch = part(golden, "in.")
        valid = batch["res_mask"] > 0.5
        for prefix, slow in (("out.", False), ("out_slow.", True)):  # with gradients PyTorch leaves its fast path
            with torch.set_grad_enabled(slow):
                out = model(batch)
            expected = part(golden, prefix)
            for name, tolerance in MODEL_TOLERANCE.items():
                error = float((out[name].detach() - expected[name])[valid].abs().max())
                assert error <= tolerance, f"{case.name} {prefix}{name}: {error:.1e}"
            if not slow:
                assert torch.equal(out["pred_aatypes"][valid], expected["pred_aatypes"][valid])


def test_quaternions_and_matrices_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    quaternions = torch.nn.functional.normalize(torch.randn(50, 4, generator=generator, dtype=torch.float64), dim=-1)
    matrices = original_formulas.quaternion_to_matrix(quaternions)
    eye = torch.eye(3, dtype=torch.float64).expand(50, 3, 3)
    torch.testing.assert_close(matrices @ matrices.transpose(-1, -2), eye)
    torch.testing.assert_close(torch.linalg.det(matrices), torch.ones(50, dtype=torch.float64))
    back = original_formulas.matrix_to_quaternion(matrices)
    torch.testing.assert_close((back * quaternions).sum(-1).abs(), torch.ones(50, dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------- the harness

TARGETS = """
import torch

def allocate(megabytes):
    def hold(size):
        block = torch.ones(int(size * 1e6 / 4))
        return block.sum()
    return lambda: hold(1), lambda: hold(megabytes)

def faults(megabytes):
    import resource
    block = torch.ones(int(megabytes * 1e6 / 4))
    block + 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block + 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def fail():
    raise ValueError("from the child")
"""


@pytest.fixture
def targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that fresh processes can import."""
    (tmp_path / "measured_targets.py").write_text(TARGETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "measured_targets"


def work(times: int) -> None:
    """About 2 ms of arithmetic, so many times."""
    for _ in range(times):
        sum(range(100_000))


@pytest.mark.slow  # a clock decides: not for a machine that does other things
def test_a_function_that_does_half_the_work_is_twice_as_fast() -> None:
    found = measure.compare(lambda: work(2), lambda: work(1), pairs=9)
    assert found.pairs == 9
    assert found.low <= found.ratio <= found.high
    assert 1.6 < found.cpu_ratio < 2.5  # CPU time: this must hold on a machine that others use
    assert found.ratio > 1.1


def test_a_function_is_not_compared_with_itself() -> None:
    def once() -> None:
        work(1)

    with pytest.raises(ValueError, match="same object"):
        measure.compare(once, once)


def test_memory_of_a_known_allocation_is_seen(targets: str) -> None:
    found = measure.extra_peak_memory(f"{targets}:allocate", 150)
    assert 145 < found < 165


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
# Page faults are the machine's: with both cores busy the kept memory was seen to fault all the same, five times over.
@pytest.mark.slow
def test_glibc_keeps_its_memory_when_told_to(targets: str) -> None:
    default = measure.in_fresh_process(f"{targets}:faults", 100)
    # What a busy machine takes back in between is not glibc's doing: the fewest of some attempts.
    attempts = (measure.in_fresh_process(f"{targets}:faults", 100, keep_memory=True) for _ in range(5))
    kept = next((faults for faults in attempts if faults < default / 10), default)
    if default < 40:
        pytest.skip(f"this C library does not give 100 MB back by itself ({default} page faults)")
    assert kept < default / 10


def test_a_failure_in_a_fresh_process_is_told(targets: str) -> None:
    with pytest.raises(measure.ChildFailed, match="from the child"):
        measure.in_fresh_process(f"{targets}:fail")


def test_rows_become_json(tmp_path: Path) -> None:
    row = measure.Row("a", "float32", "b", False, True, "", None, (2.0, 1.0), ("torch",), measure.machine())
    measure.write_rows([row], tmp_path / "deep" / "rows.json")
    (read,) = json.loads((tmp_path / "deep" / "rows.json").read_text())
    assert read["machine"]["torch"] == torch.__version__
    assert read["memory_mb"] == [2.0, 1.0]


# ------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("component", ["ipa", "edge_transition", "edge_features", "model"])
@pytest.mark.parametrize("mode", ["forward", "step"])
def test_the_baseline_is_right_against_itself(component: str, mode: str) -> None:
    correct, words = multiflow_cpu.check(multiflow_cpu.Task(component, mode, 12, self_check=True))
    assert correct, words


@pytest.mark.parametrize("mode", ["forward", "step"])
def test_a_red_row_has_no_time(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build = multiflow_cpu._build

    def slightly_wrong(task: Any, ours: bool, dropout: float) -> torch.nn.Module:
        module: torch.nn.Module = build(task, ours, dropout)
        if ours:
            with torch.no_grad():
                module.get_parameter("final_layer.weight")[0] *= 1.001
        return module

    task = asdict(multiflow_cpu.Task("edge_transition", mode, 12, self_check=True))
    right = multiflow_cpu.measure_row(task, pairs=1)
    assert right["correct"] and right["time"]["a_ms"] > 0
    monkeypatch.setattr(multiflow_cpu, "_build", slightly_wrong)
    wrong = multiflow_cpu.measure_row(task, pairs=1)
    assert not wrong["correct"] and wrong["time"] is None and "plain PyTorch" in wrong["check"]


def test_weights_are_nowhere_zero() -> None:
    module = multiflow_cpu.build_original("model", 0.0)
    assert all(bool((parameter != 0).all()) for parameter in module.parameters())
