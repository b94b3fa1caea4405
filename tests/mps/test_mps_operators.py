"""A Mac without a Mac: every ATen operator that runs here has an MPS kernel, and no float64 tensor appears.

What an operator has is read from the native_functions.yaml that comes with torch. Attention is traced in PyTorch's
composite form, because its fused CPU operators are a CPU's choice, and inside our custom operators too.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from foldkernels.compat import multiflow
from foldkernels.compat.multiflow.flow.interpolant import Interpolant
from foldkernels.kernels.registry.binding import bind
from foldkernels.kernels.testing.accuracy import required
from foldkernels.kernels.testing.cases.builders import DROPOUTS
from foldkernels.modules.edge_features import EdgeFeatureNet
from foldkernels.modules.edge_transition import EdgeTransition
from foldkernels.modules.esm2 import ESM2
from foldkernels.modules.invariant_point_attention import InvariantPointAttention
from foldkernels.modules.rigid import Rigid
from foldkernels.modules.sequence_transformer import SequenceTransformer

from ..kernels.kernel_cases import build, operations
from ..support import mps_operators
from ..support.mps_operators import collected, runs_on_mps

GOLDENS = Path(__file__).parents[1] / "goldens" / "multiflow"
#: Files of the sampler whose tensors are on the CPU whatever the model's device is.
ON_THE_CPU = (
    *(os.path.join("multiflow", "flow", name) for name in ("noise.py", "discrete_steps.py")),
    os.path.join("multiflow", "structures", "backbone.py"),
)


# The check itself -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["add.Tensor", "relu_", "mm.out", "softmax.int", "native_layer_norm", "new_empty"])
def test_operators_that_mps_has(name):
    assert runs_on_mps(name)


@pytest.mark.parametrize(
    "name", ["binomial", "_linalg_svd", "_linalg_eigh", "_scaled_dot_product_flash_attention_for_cpu"]
)
def test_operators_that_mps_lacks(name):
    assert not runs_on_mps(name)


@torch.library.custom_op("foldkernels_test::svd", mutates_args=())
def _svd_inside(x: Tensor) -> Tensor:
    return torch.linalg.svd(x)[1]


PLANTED = {
    "aten::_linalg_svd": lambda: torch.linalg.svd(torch.rand(3, 3)),
    "aten::binomial": lambda: torch.binomial(torch.ones(2), torch.ones(2)),
    "aten::_linalg_svd inside a custom operator": lambda: _svd_inside(torch.rand(3, 3)),
    "aten::_linalg_eigh in a backward pass": lambda: _through(torch.rand(3, 3)),
}


class _Eigen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return torch.linalg.eigvalsh(gradient)[None] + gradient


def _through(x: Tensor) -> None:
    _Eigen.apply(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize("name", PLANTED)
def test_an_operator_without_mps_is_seen(name):
    with pytest.raises(AssertionError, match=f"without an MPS kernel\n.*{name.partition(' ')[0]}"), collected():
        PLANTED[name]()


def test_float64_is_seen():
    with pytest.raises(AssertionError, match="float64"), collected():
        torch.ones(3).double().float()


def test_an_operator_that_nobody_lists_is_seen(monkeypatch):
    monkeypatch.setattr(mps_operators, "functions", dict)
    with pytest.raises(AssertionError, match="does not have it"), collected():
        torch.ones(3)


# What we run ----------------------------------------------------------------------------------------------------------

EVERY = [
    (operation, kernel, more)
    for operation in operations()
    for kernel in ("reference", "torch")
    for more in ([{}, {"dropout": 0.3}] if operation in DROPOUTS else [{}])
    if (operation, kernel, bool(more)) != ("invariant_point_attention", "torch", True)  # it drops no logits
]


@pytest.mark.parametrize("variant", ["plain", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("operation", "kernel", "more"), EVERY)
def test_operation(operation, kernel, more, dtype, variant):
    case = build(operation, 7, variant, 0, **more)
    x: dict[str, Any] = {}
    for name, value in case.values.items():
        if value is not None and value.is_floating_point():
            held = torch.float32 if name in case.points else dtype
            value = value.to(held).requires_grad_(name not in case.constants)
        x[name] = value
    leaves = [value for value in x.values() if value is not None and value.requires_grad]
    with required(operation, kernel) as config, collected() as found:
        outputs = case.call(x, config)
        torch.autograd.grad(torch.stack([out.float().square().sum() for out in outputs]).sum(), leaves)
        with torch.no_grad():
            case.call(x, config)
    assert kernel == "reference" or operation == "attention" or found.inside, "nothing of ours was looked into"


N = 9


def _modules() -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    torch.manual_seed(0)
    s, z, mask = torch.randn(2, N, 16), torch.randn(2, N, N, 8), torch.ones(2, N)
    mask[0, 5:] = 0.0
    frames = Rigid(torch.eye(3).expand(2, N, 3, 3).contiguous(), torch.randn(2, N, 3))
    edges = SimpleNamespace(c_s=16, c_p=8, feat_dim=6, num_bins=22, embed_chain=True, embed_diffuse_mask=True)
    ipa = InvariantPointAttention(c_s=16, c_z=8, c_hidden=4, no_heads=2, no_qk_points=2, no_v_points=3)
    xyz, ones = torch.randn(2, N, 3), torch.ones(2, N)
    return {
        "InvariantPointAttention": (ipa, (s, z, frames, mask, mask[:, :, None] * mask[:, None])),
        "EdgeTransition": (EdgeTransition(node_embed_size=16, edge_embed_in=8, edge_embed_out=8), (s, z, mask)),
        "EdgeFeatureNet": (EdgeFeatureNet(edges), (s, xyz, xyz, mask[:, :, None] * mask[:, None], ones, ones)),
        "SequenceTransformer": (SequenceTransformer(16, 2, 2, 0.1), (s, mask > 0.5)),
    }


@pytest.mark.parametrize("kernel", ["reference", "torch"])
@pytest.mark.parametrize("name", sorted(_modules()))
def test_module(name, kernel):
    module, given = _modules()[name]
    bind(module, kernel)
    with collected():
        module.train()(*given).square().sum().backward()
        with torch.no_grad():
            module.eval()(*given)


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    case = load_file(GOLDENS / "small" / "case_L17.safetensors")
    return {name.removeprefix("in."): value for name, value in case.items() if name.startswith("in.")}


@pytest.mark.parametrize("kernel", ["reference", "torch", {"preset": "torch", "precision": "bfloat16"}], ids=str)
def test_multiflow_model(kernel, batch):
    """Inference, and a training step: loss, gradients, Adam."""
    model = multiflow.load(GOLDENS / "small", kernel=kernel)
    with collected():
        with torch.no_grad():
            model(batch)
        model.train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
        out = model(batch)
        loss = out["pred_trans"].square().mean() + out["pred_rotmats"].square().mean()
        loss = loss + nn.functional.cross_entropy(out["pred_logits"].flatten(0, 1), batch["aatypes_t"].flatten())
        loss.backward()
        optimiser.step()


@pytest.mark.parametrize("kernel", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_esm2(kernel, dtype):
    """A padded batch as a whole, as a GPU computes it, with all that can be asked for; a step; contacts alone."""
    torch.manual_seed(0)
    model = ESM2(2, 16, 2).to(dtype)
    bind(model, kernel)
    tokens = torch.randint(4, 24, (2, N))
    tokens[0, 6:] = 1
    present = tokens != 1
    with collected():
        with torch.no_grad():
            model._pass(tokens, present, {0, 2}, True)
            model.predict_contacts(tokens)
        model._pass(tokens, present, {1}, False)["logits"].float().square().sum().backward()


def _in_a_file_of_the_cpu() -> bool:
    """Whether a caller stands in one of the sampler's files whose tensors are on the CPU by design."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(ON_THE_CPU):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


@pytest.mark.parametrize("purity", [True, False])
def test_sampling(purity, batch):
    """Draws and residue types are the CPU's, and only they use what MPS lacks."""
    model = multiflow.load(GOLDENS / "small", kernel="torch")
    config = model.config.interpolant
    config.aatypes.do_purity, config.aatypes.noise = purity, 1.0
    with collected(_in_a_file_of_the_cpu) as found:
        Interpolant(config).sample(2, 9, model, num_timesteps=3, progress=False)
    assert "aten::multinomial" in found.on_the_cpu and "aten::multinomial" not in found.operators
    assert any(name.startswith("aten::randn") for name in found.on_the_cpu), "noise is drawn on the CPU"
    words = ("rand", "bernoulli", "normal_", "uniform")
    random = {name for name in found.operators if any(word in name for word in words)}
    assert not random, "random numbers drawn outside the files that draw on the CPU"
