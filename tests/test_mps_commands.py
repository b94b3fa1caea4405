"""A Mac without a Mac: models and the work of the commands, on tensors that say they are on MPS.

A tensor that is sent to MPS stays where it is, and is marked with all that is computed from it, until it is sent to the
CPU. So what the CPU is meant to do (draws, the definition in float64, files) needs no list: it has marks nowhere. On
marked tensors every operator needs an MPS kernel, none may be float64, and none may meet one from the CPU.
"""

import json
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from foldkernels.cli.benchmarking.models import MultiflowModel
from foldkernels.cli.benchmarking.subjects import OperationSubject, Point
from foldkernels.compat import rna_frameflow
from foldkernels.compat.multiflow.checkpoint import read_checkpoint
from foldkernels.compat.multiflow.interpolant import Interpolant
from foldkernels.compat.multiflow.model import FlowModel
from foldkernels.compat.multiflow.preset_comparison import compare_presets
from foldkernels.compat.multiflow.training import corrupt_batch, losses, self_condition
from foldkernels.configs.options import FoldkernelsConfig
from foldkernels.kernels.binding import bind
from foldkernels.kernels.examples.builders import SMALL
from foldkernels.kernels.verification import plan, published_subjects, verify
from foldkernels.modules.pairformer import PairformerLayer, PairformerNoSeqLayer

from .kernel_cases import operations
from .support.goldens import MULTIFLOW, model_of, part, small_checkpoint
from .support.mps import on_mps

TINY = MULTIFLOW.parent / "esm" / "esm2_t3_tiny.pt"
RANDOM = ("rand", "bernoulli", "normal_", "uniform", "multinomial", "dropout")
CHECKPOINT = cache(lambda: read_checkpoint(MULTIFLOW / "small_chain"))
N = 9


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean() -> dict[str, Tensor]:
    from foldkernels.cli.benchmarking.draws import draw_chains

    drawn = draw_chains(N, torch.Generator().manual_seed(0), 2, 21)
    clean = {name: drawn[name] for name in ("res_mask", "diffuse_mask", "chain_idx", "res_idx")}
    return clean | {"trans_1": drawn["trans_t"], "rotmats_1": drawn["rotmats_t"], "aatypes_1": drawn["aatypes_t"] % 20}


def train_once(model: FlowModel, clean: dict[str, Tensor], on: str = "mps") -> None:
    """What `train` computes in a step, as the Lightning module does it: noise on the CPU, the rest on MPS."""
    model.to(on).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    noisy = corrupt_batch(clean, small_checkpoint().config.interpolant)
    noisy = self_condition(model, {name: value.to(on) for name, value in noisy.items()})
    losses(model, noisy, {})["train_loss"].mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()


SECTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "esm_combiner": {"esm_combiner": {"checkpoint": str(TINY)}},
    "esm_combiner_single": {"esm_combiner": {"checkpoint": str(TINY), "only_single": True}},
    "enrichment_ipa": {"enrichment": {"block": "ipa", "num_layers": 1}},
}


def _some(names: Iterable[str], quick: Iterable[str]) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", _some(SECTIONS, ["plain"]))
def test_multiflow_trains_and_samples(name, clean):
    """Draws and residue types are the CPU's, and no random number is drawn on MPS but dropout's."""
    checkpoint = small_checkpoint()
    model = FlowModel(CHECKPOINT().config.model, FoldkernelsConfig.model_validate(SECTIONS[name]))
    bind(model, "torch")
    with on_mps() as found:
        train_once(model, clean)
    assert any("_backward" in name for name in found.operators)
    config = checkpoint.config.interpolant
    with on_mps() as found:
        Interpolant(config).sample(2, N, model.to("mps").eval(), num_timesteps=2, progress=False)
    random = {name for name in found.operators if any(word in name for word in RANDOM)}
    assert not random, "random numbers drawn on MPS"


@pytest.mark.parametrize("case", ["flash_1d_bias", "dense"])
def test_rna_frameflow(case):
    path = MULTIFLOW.parent / "rna_frameflow" / f"{case}.safetensors"
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["cfg"])
    model = rna_frameflow.FlowModel(config)
    bind(model, "torch")
    batch = part(load_file(path), "in.")
    with on_mps():
        model.to("mps").train()
        out = model({name: value.to("mps") for name, value in batch.items()})
        sum(value.square().mean() for value in out.values()).backward()


@pytest.mark.parametrize("no_seq", [True, False])
def test_pairformer(no_seq):
    s, z, mask = torch.randn(2, N, 16), torch.randn(2, N, N, 8), torch.ones(2, N)
    sizes = {"pairwise_head_width": 4, "pairwise_num_heads": 2}
    layer: nn.Module = PairformerNoSeqLayer(8, **sizes) if no_seq else PairformerLayer(16, 8, 2, v2=True, **sizes)
    bind(layer, "torch")
    with on_mps():
        # As in a model, whose first layers are before these.
        s, z, mask = s.to("mps").requires_grad_(), z.to("mps").requires_grad_(), mask.to("mps")
        pairs = mask[:, :, None] * mask[:, None]
        out = layer.to("mps").train()(*((z, pairs) if no_seq else (s, z, mask, pairs)))
        sum(x.square().mean() for x in (out if isinstance(out, tuple) else (out,))).backward()


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", _some(["float32", "bfloat16"], ["float32"]))
def test_the_work_of_verify_and_of_doctor(precision):
    """Every item that runs on a Mac passes: kernels on MPS, the definition in float64 on the CPU."""
    items, _ = plan(published_subjects(), device="mps", length=6, precisions=[precision], kernels=["torch"])
    assert len(items) > 5 and {item.device for item in items} == {"mps"}
    with on_mps():
        rows = [verify(item) for item in items]
    assert [(row.operation, row.what, row.why) for row in rows if row.status != "passed"] == []


@pytest.mark.parametrize("operation", _some(operations(), ["invariant_point_attention", "attention"]))
def test_the_work_of_bench_on_an_operation(operation):
    subject = OperationSubject(operation, SMALL)
    point = Point("forward+backward", 6, "float32", "mps")
    if why := subject.why_not("torch", point):
        assert "on a CPU only" in why
        pytest.skip(f"bench says of MPS: {why}")
    with on_mps():
        assert subject.check("torch", point).passed
        subject.call("torch", point)()


@pytest.mark.slow
def test_the_work_of_bench_on_a_model():
    subject = MultiflowModel(MULTIFLOW / "small")
    point = Point("forward+backward", N, "float32", "mps")
    with on_mps():
        assert subject.check("torch", point).passed
        subject.call("torch", point)()


def test_the_work_of_verify_on_a_checkpoint():
    with on_mps():
        rows = compare_presets(model_of("small").to("mps"), N, presets=["torch", "flash"])
    assert [(row.preset, row.why) for row in rows if not row.passed] == []
