"""A Mac without a Mac: every ATen operator that runs here has an MPS kernel, and no float64 tensor appears.

What an operator has is read from the native_functions.yaml that comes with torch. Attention is traced in PyTorch's
composite form, because its fused CPU operators are a CPU's choice, and inside our custom operators too.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchgen
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foldkernels.compat import multiflow
from foldkernels.compat.multiflow.interpolant import Interpolant
from foldkernels.kernels.accuracy import required
from foldkernels.kernels.binding import bind
from foldkernels.kernels.examples.builders import DROPOUTS
from foldkernels.modules.edge_features import EdgeFeatureNet
from foldkernels.modules.edge_transition import EdgeTransition
from foldkernels.modules.esm2 import ESM2
from foldkernels.modules.invariant_point_attention import InvariantPointAttention
from foldkernels.modules.rigid import Rigid
from foldkernels.modules.sequence_transformer import SequenceTransformer

from .kernel_cases import build, operations

GOLDENS = Path(__file__).parent / "goldens" / "multiflow"
#: Operators that need no MPS kernel, each with the reason why.
ALLOWED: dict[str, str] = {}
#: Files of the sampler whose tensors are on the CPU whatever the model's device is.
ON_THE_CPU = tuple(os.path.join("multiflow", name) for name in ("draws.py", "residue_types.py", "backbone.py"))
COMPOSITE = ("CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")


# What has an MPS kernel -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def functions() -> Mapping[str, Mapping[str, Any]]:
    """torch's own list of operators by name, "add.Tensor"."""
    file = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    entries = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)
    return {entry["func"].partition("(")[0].strip(): entry for entry in entries}


def keys(name: str) -> set[str]:
    """The dispatch keys of an operator.

    Raises:
        KeyError: torch's list does not have it.
    """
    entry = functions()[name]
    if "structured_delegate" in entry:
        return keys(entry["structured_delegate"])
    if "dispatch" not in entry:
        return {"CompositeImplicitAutograd"}
    return {key.strip() for several in entry["dispatch"] for key in several.split(",")}


def runs_on_mps(name: str) -> bool:
    """Whether MPS has a kernel, or the operator is made of others."""
    found = keys(name)
    # torch writes the out= and functional forms of some operators itself, from the one that is listed.
    return bool(found & {"MPS", *COMPOSITE}) or bool(functions()[name].get("autogen") and found & {"MPS", *COMPOSITE})


class Collect(TorchDispatchMode):
    """Collect the operators that run, and where a tensor of float64 appears.

    Args:
        elsewhere: Whether an operator that runs now is a CPU's by design.
    """

    def __init__(self, elsewhere: Callable[[], bool] = lambda: False) -> None:
        super().__init__()
        self.operators: set[str] = set()
        self.on_the_cpu: set[str] = set()
        self.inside: set[str] = set()
        self.wide: set[str] = set()
        self.elsewhere = elsewhere

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name()
        ours = OPDEFS.get(name.partition(".")[0])
        if ours is not None:
            # Run its Python body under this mode, to see what it is made of.
            self.inside.add(name)
            with self:
                return ours._init_fn(*args, **(kwargs or {}))
        if name.startswith("profiler::"):
            return func(*args, **(kwargs or {}))
        # Inside a custom operator, which is below autograd, composite operators arrive whole.
        with self:
            out = func.decompose(*args, **(kwargs or {}))
        if out is not NotImplemented:
            return out
        out = func(*args, **(kwargs or {}))
        if self.elsewhere():
            self.on_the_cpu.add(name)
            return out
        self.record(name, (args, kwargs), out)
        return out

    def record(self, name: str, given: Any, out: Any) -> None:
        """Note an operator that ran."""
        self.operators.add(name)
        if any(isinstance(x, Tensor) and x.dtype is torch.float64 for x in tree_leaves((given, out))):
            self.wide.add(name)

    def missing(self) -> list[str]:
        """Operators without an MPS kernel, unknown ones among them."""
        missing = []
        for name in sorted(self.operators):
            short = name.removeprefix("aten::")
            if short in ALLOWED:
                continue
            if short not in functions():
                missing.append(f"{name} (torch's list does not have it)")
            elif not runs_on_mps(short):
                missing.append(name)
        return missing


@contextmanager
def collected(elsewhere: Callable[[], bool] = lambda: False, collect: Collect | None = None) -> Iterator[Collect]:
    """Run as a Mac would, and fail if a Mac could not."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), collect or Collect(elsewhere) as found:
            yield found
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert found.operators, "nothing ran"
    assert found.missing() == [], "operators without an MPS kernel"
    assert sorted(found.wide) == [], "operators that saw a float64 tensor"


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
    monkeypatch.setattr(sys.modules[__name__], "functions", dict)
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
