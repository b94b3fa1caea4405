"""The pair modules compute what Boltz-2's compute, with its weights, loaded strictly: outputs and gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from foldkernels.kernels.registry import record_kernels
from foldkernels.kernels.registry.binding import bind
from foldkernels.modules.attention_pair_bias import AttentionPairBias, AttentionPairBiasV1
from foldkernels.modules.outer_product_mean import OuterProductMean
from foldkernels.modules.pair_weighted_averaging import PairWeightedAveraging
from foldkernels.modules.pairformer import PairformerLayer, PairformerNoSeqLayer
from foldkernels.modules.transition import Transition
from foldkernels.modules.triangle_attention import TriangleAttentionEndingNode, TriangleAttentionStartingNode
from foldkernels.modules.triangle_multiplication import TriangleMultiplicationIncoming, TriangleMultiplicationOutgoing

from ..support.goldens import part

pytestmark = pytest.mark.quick

FOLDER = Path(__file__).resolve().parents[1] / "goldens" / "boltz"
KERNELS = ("reference", "torch")
OPERATION, LAYER = 5e-6, 1e-5  # what an output may differ by
GRADIENT = 1e-5  # relative to the largest gradient, or 1
TRIANGLES = ("triangle_multiplication", "triangle_attention")

# name -> how the module is made, what its output may differ by, and the operations that it must have run
CASES: dict[str, tuple[Callable[..., nn.Module], float, tuple[str, ...]]] = {
    "N16/attention_pair_bias_v1": (AttentionPairBiasV1, OPERATION, ("attention_pair_bias",)),
    "N16/attention_pair_bias_v2": (AttentionPairBias, OPERATION, ("attention_pair_bias",)),
    "N16/attention_pair_bias_v2_precomputed_bias": (
        lambda **sizes: AttentionPairBias(**sizes, compute_pair_bias=False),
        OPERATION,
        ("attention_pair_bias",),
    ),
    "N16/outer_product_mean": (OuterProductMean, OPERATION, ()),
    "N16/pair_weighted_averaging": (PairWeightedAveraging, OPERATION, ()),
    "N16/pairformer_layer_v2": (PairformerLayer, LAYER, (*TRIANGLES, "attention_pair_bias")),
    "N16/pairformer_noseq_layer": (PairformerNoSeqLayer, LAYER, TRIANGLES),
    "N16/transition": (Transition, OPERATION, ()),
    "N16/tri_mul_in": (TriangleMultiplicationIncoming, OPERATION, ("triangle_multiplication",)),
    "N16/tri_mul_out": (TriangleMultiplicationOutgoing, OPERATION, ("triangle_multiplication",)),
    "tri_att_N24/tri_att_end": (TriangleAttentionEndingNode, OPERATION, ("triangle_attention",)),
    "tri_att_N24/tri_att_end_ragged": (TriangleAttentionEndingNode, OPERATION, ("triangle_attention",)),
    "tri_att_N24/tri_att_start": (TriangleAttentionStartingNode, OPERATION, ("triangle_attention",)),
    "tri_att_N24/tri_att_start_ragged": (TriangleAttentionStartingNode, OPERATION, ("triangle_attention",)),
}


class Golden:
    """A module with the golden's weights, the original's arguments, and what must come out."""

    def __init__(self, name: str, kernel: str) -> None:
        make, self.tolerance, self.operations = CASES[name]
        self.expected = load_file(FOLDER / f"{name}.safetensors")
        with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
            metadata = file.metadata()
        shared = load_file(FOLDER / name.split("/")[0] / "inputs.safetensors")
        self.arguments = {a: shared[b] for a, b in json.loads(metadata["inputs_from_inputs.safetensors"]).items()}
        self.arguments |= part(self.expected, "in.")
        if "bias" in self.arguments:
            self.arguments["z"] = self.arguments.pop("bias")
        self.module = make(**json.loads(metadata["cfg"])).eval()
        self.module.load_state_dict(part(self.expected, "w."), strict=True)
        bind(self.module, kernel)
        self.kernel = kernel

    def leaves(self) -> dict[str, Tensor]:
        """Give the floating inputs gradients; where a golden has none for `k_in`, it was s itself."""
        leaves = {name: x.clone().requires_grad_() for name, x in self.arguments.items() if "mask" not in name}
        self.arguments |= leaves
        return leaves

    def run(self) -> tuple[Tensor, ...]:
        arguments = dict(self.arguments)
        if isinstance(self.module, AttentionPairBias):
            arguments.setdefault("k_in", arguments["s"])
        out = self.module(**arguments)
        return out if isinstance(out, tuple) else (out,)

    def valid(self, i: int) -> Tensor:
        """True where the original's output means something: the loss has no weight elsewhere."""
        return self.expected[f"loss_w.{i}"] != 0

    def error(self, i: int, out: Tensor) -> float:
        truth = self.expected[f"out.{i}"].double() + self.expected[f"d64.{i}"].double()
        assert out.shape == truth.shape
        return float((out.detach().double() - truth)[self.valid(i)].abs().max())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_boltzs(name: str, kernel: str) -> None:
    golden = Golden(name, kernel)
    before = {argument: x.clone() for argument, x in golden.arguments.items()}
    with torch.no_grad(), record_kernels() as ran:
        outs = golden.run()
    assert {line.partition(": ")[2] for line in ran} <= {kernel}
    fused = {"triangle_attention_update": "triangle_attention"}
    assert {fused.get(used := line.partition(": ")[0], used) for line in ran} == set(golden.operations)
    for i, out in enumerate(outs):
        assert golden.valid(i).float().mean() > 0.3
        assert golden.error(i, out) <= golden.tolerance
    assert all(torch.equal(golden.arguments[argument], x) for argument, x in before.items())  # the caller's stay


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_boltzs(name: str, kernel: str) -> None:
    """With gradients the modules go other ways: outputs again, then every gradient that the golden holds."""
    golden = Golden(name, kernel)
    leaves = golden.leaves()
    outs = golden.run()
    losses = []
    for i, out in enumerate(outs):
        assert golden.error(i, out) <= golden.tolerance
        losses.append((out * golden.expected[f"loss_w.{i}"]).sum())
    torch.stack(losses).sum().backward()
    found = {f"grad.{n}": x.grad for n, x in leaves.items()}
    found |= {"grad.bias": found.get("grad.z")}
    found |= {f"gradw.{n}": w.grad for n, w in golden.module.named_parameters()}
    for key, expected in golden.expected.items():
        if key.startswith(("grad.", "gradw.")):
            gradient = found[key]
            assert gradient is not None, key
            scale = max(1.0, float(expected.abs().max()))
            assert float((gradient - expected).abs().max()) <= GRADIENT * scale, key


@pytest.mark.parametrize("name", CASES)
def test_a_changed_weight_shows(name: str) -> None:
    """Each weight moves the output by more than the tolerance: a module that ignored one would be seen."""
    golden = Golden(name, "torch")
    draws = torch.Generator().manual_seed(0)
    for weight_name, weight in golden.module.named_parameters():
        if weight_name.endswith(("proj_z.0.bias", "norm_z.bias")):
            continue  # the same for all keys: the softmax removes it
        with torch.no_grad():
            kept = weight.clone()
            # No common factor: the LayerNorm behind a projection would remove it.
            weight.add_(0.1 * kept.abs().mean() * torch.randn(kept.shape, generator=draws))
            changed = max(golden.error(i, out) for i, out in enumerate(golden.run()))
            weight.copy_(kept)
        assert changed > 2 * golden.tolerance, weight_name


def test_no_parameter_more_and_none_less() -> None:
    golden: Any = Golden("N16/pairformer_layer_v2", "torch")
    weights = part(golden.expected, "w.")
    with pytest.raises(RuntimeError, match=r"pre_norm_s\.weight"):
        golden.module.load_state_dict({k: v for k, v in weights.items() if k != "pre_norm_s.weight"}, strict=True)
    assert set(golden.module.state_dict()) == set(weights)
