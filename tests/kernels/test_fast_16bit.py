"""Both ways to multiply 16-bit data on any machine: in 16 bits, where processors are fast at that, and in float32.

What the rest of the tests runs is this machine's own way. Here the other one is forced: a sample in `make test`, all of
the contract, the draws, `verify` and the goldens in `make test-all`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file
from torch import Tensor

from foldkernels.compat import esm, rna_frameflow
from foldkernels.kernels.common import blocking
from foldkernels.kernels.hardware import cpu, machine
from foldkernels.kernels.registry import record_kernels
from foldkernels.kernels.testing import accuracy
from foldkernels.kernels.testing.cases.memory_layouts import VARIANTS
from foldkernels.kernels.testing.contract_grid import truth_and_plain
from foldkernels.kernels.testing.verification import plan, published_subjects, verify

from ..compat.flash_ipa import test_flash_ipa_trunks as frameflow
from ..modules import test_boltz_goldens as boltz
from ..support import drawn, flash_ipa
from ..support.goldens import batch_of, model_of, part, read
from . import test_kernel_contract as contract
from . import test_kernel_draws as draws
from .kernel_cases import DTYPES, assert_all_as_good, case_for, operations

HALF = (torch.bfloat16, torch.float16)
#: The way that this machine does not take by itself.
OTHER = "off" if cpu.natively_fast_bfloat16() else "on"
LENGTHS = (7, 33, 129)


@pytest.fixture
def other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.FAST_VARIABLE, OTHER)
    products = torch.bfloat16 if OTHER == "on" else torch.float32
    assert blocking.block_dtype(torch.empty(0, dtype=torch.bfloat16)) is products
    assert machine.fast_bfloat16() is (OTHER == "on")


# Operations -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("operation", operations())
def test_numbers(operation, n, other_way):
    """Outputs and every gradient, with masks."""
    case, size = case_for(operation, "torch", n, "masked", torch.bfloat16, "cpu")
    truth, plain = truth_and_plain(operation, n, "masked", size, torch.bfloat16, "cpu")
    got = accuracy.run(case, "torch", torch.bfloat16, variant="masked")
    assert_all_as_good(got, plain, truth, torch.bfloat16)


@pytest.mark.parametrize("way", ["on", "off"])
@pytest.mark.parametrize("operation", operations())
def test_numbers_in_float16(operation, way, monkeypatch):
    """The contract runs bfloat16; float16 takes the same two ways."""
    monkeypatch.setenv(cpu.FAST_VARIABLE, way)
    case, size = case_for(operation, "torch", 33, "masked", torch.float16, "cpu")
    truth, plain = truth_and_plain(operation, 33, "masked", size, torch.float16, "cpu")
    got = accuracy.run(case, "torch", torch.float16, variant="masked")
    assert_all_as_good(got, plain, truth, torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", contract.LENGTHS)
@pytest.mark.parametrize("operation", operations())
def test_the_whole_contract(operation, n, variant, dtype, other_way):
    case, size = case_for(operation, "torch", n, variant, dtype, "cpu")
    truth, plain = truth_and_plain(operation, n, variant, size, dtype, "cpu")
    assert_all_as_good(accuracy.run(case, "torch", dtype, variant=variant), plain, truth, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("operation", operations())
def test_blocks_of_uneven_size(operation, rows, other_way, monkeypatch):
    contract.shrink_blocks(monkeypatch, 7, rows)
    case, size = case_for(operation, "torch", 7, "masked", torch.bfloat16, "cpu")
    truth, plain = truth_and_plain(operation, 7, "masked", size, torch.bfloat16, "cpu")
    assert_all_as_good(accuracy.run(case, "torch", torch.bfloat16, variant="masked"), plain, truth, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("operation", operations())
def test_drawn_calls(operation, other_way):
    @draws.FEW
    @given(drawn.calls((operation,), draws.KERNELS, 24))
    def test(call: drawn.Call) -> None:
        draws.holds(call)

    test()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_verify(precision, other_way):
    """Every operation at the sizes of published models."""
    items, _ = plan(published_subjects(), device="cpu", length=48, precisions=(precision,), kernels=("torch",))
    assert {item.subject.operation for item in items} == set(operations())
    rows = [verify(item) for item in items]
    assert [row for row in rows if row.status != "passed"] == []


def test_the_sample_is_of_what_the_contract_tries():
    assert set(LENGTHS) <= set(contract.LENGTHS) and torch.bfloat16 in DTYPES


# Models ---------------------------------------------------------------------------------------------------------------


def multiflow(name: str, kernel: str) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    golden, batch = read(f"{name}.safetensors")[0], batch_of(f"{name}.safetensors")
    there = batch["res_mask"] > 0.5
    out = model_of(name.split("/")[0], kernel)(batch)
    names = ("pred_trans", "pred_rotmats", "pred_logits")
    truth = {x: golden[f"out.{x}"].double() + golden[f"d64.{x}"] for x in names}
    return {x: out[x][there] for x in names}, {x: truth[x][there] for x in names}


def boltz_module(name: str, kernel: str) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    golden = boltz.Golden(name, kernel)
    outs = {str(i): out[golden.valid(i)] for i, out in enumerate(golden.run())}
    truth = {i: golden.expected[f"out.{i}"].double() + golden.expected[f"d64.{i}"] for i in outs}
    return outs, {i: true[golden.valid(int(i))] for i, true in truth.items()}


def esm2(case: str, kernel: str) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    folder = Path(__file__).resolve().parents[1] / "goldens" / "esm"
    golden = load_file(folder / f"tiny_case_{case}.safetensors")
    model, there = esm.load(folder / "esm2_t3_tiny.pt", kernel)[0], golden["tokens"] != 1
    found = model(golden["tokens"], repr_layers=[3])
    outs = {"logits": found["logits"], "representations": found["representations"][3]}
    return {x: out[there] for x, out in outs.items()}, {
        "logits": golden["logits"][there].double(),
        "representations": golden["repr.3"][there].double(),
    }


def flash_ipa_model(mode: str, kernel: str) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    model, golden = flash_ipa.model_of(mode, kernel)
    batch = part(golden, "in.")
    out, there = model(batch), batch["node_mask"] > 0.5
    names = ("pred_trans", "pred_rotmats")
    return {x: out[x][there] for x in names}, {x: golden[f"out.{x}"][there].double() for x in names}


def rna_model(case: str, kernel: str) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    golden, config = frameflow.golden(case)
    model = flash_ipa.with_weights(rna_frameflow.FlowModel(config), golden, kernel)
    batch = part(golden, "in.")
    out, there = model(batch), batch["res_mask"] > 0.5
    names = ("pred_trans", "pred_rotmats")
    return {x: out[x][there] for x in names}, {x: golden[f"out.{x}"][there].double() for x in names}


Outcome = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
GOLDENS: dict[Callable[[str, str], Outcome], tuple[str, ...]] = {
    multiflow: ("small/case_L17", "small/case_L64", "small_chain/case_L40", "full/case_L17"),
    boltz_module: ("N16/pairformer_layer_v2", *(x for x in boltz.CASES if x != "N16/pairformer_layer_v2")),
    esm2: ("pad", "nopad"),
    flash_ipa_model: ("orig_2d_bias", "flash_1d_bias", "flash_2d_factorize_bias"),
    rna_model: ("dense", "flash_1d_bias"),
}


@pytest.mark.parametrize(
    ("outcome", "name"),
    [
        pytest.param(outcome, name, marks=[pytest.mark.slow] if i else [], id=f"{outcome.__name__}-{name}")
        for outcome, names in GOLDENS.items()
        for i, name in enumerate(names)
    ],
)
def test_goldens_under_autocast(outcome, name, other_way):
    """At most twice as far from the original in float32 as the definitions are under the same autocast, and a floor."""
    errors: dict[str, dict[str, float]] = {}
    for kernel in ("reference", "torch"):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), record_kernels() as ran:
            outs, truth = outcome(name, kernel)
        assert {line.partition(": ")[2] for line in ran} <= {kernel}
        for key, true in truth.items():
            error = float((outs[key].double() - true).abs().max())
            errors.setdefault(key, {})[kernel] = error
            errors[key]["largest"] = float(true.abs().max())
    assert errors
    for key, of in errors.items():
        assert of["torch"] <= 2 * of["reference"] + accuracy.FLOOR[torch.bfloat16] * of["largest"], (key, of)
        assert of["torch"] <= 0.05 * of["largest"], (key, of)
