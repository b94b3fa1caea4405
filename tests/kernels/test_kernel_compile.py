"""Kernels under torch.compile: whole graphs, few of them, the same numbers; and custom operators that pass opcheck."""

import gc
import logging
import shutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from foldkernels.configs.kernel import KernelConfig
from foldkernels.configs.presets import candidates
from foldkernels.kernels import registry
from foldkernels.kernels.common.nearest_neighbors import nearest_neighbours
from foldkernels.kernels.registry import choice, registration
from foldkernels.kernels.registry.binding import bind
from foldkernels.kernels.registry.types import Reason, Request
from foldkernels.kernels.testing.accuracy import required
from foldkernels.kernels.testing.cases.builders import DROPOUTS
from foldkernels.kernels.testing.cases.case import Case
from foldkernels.modules.edge_features import EdgeFeatureNet
from foldkernels.modules.edge_transition import EdgeTransition
from foldkernels.modules.invariant_point_attention import InvariantPointAttention
from foldkernels.modules.node_features import NodeFeatureNet
from foldkernels.modules.rigid import Rigid
from foldkernels.modules.sequence_transformer import SequenceTransformer
from foldkernels.modules.structure import BackboneUpdate, StructureModuleTransition, TorsionAngles
from foldkernels.modules.trunk import Trunk

from .kernel_cases import build, operations

pytestmark = pytest.mark.quick

# Compiling costs seconds, the same for each length that is new: of what users get in the end, inductor's code, one test
# that is slow tells; the others stop at the graph.
LENGTHS = (9, 17, 33, 12, 24)
NAMESPACE = "foldkernels::"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test compiles for itself; nobody listens to the compiler's trace, or pytest would keep all of it."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Custom operators -----------------------------------------------------------------------------------------------------


class _Calls(TorchDispatchMode):
    """Keep the arguments of each call of our operators, one of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[str, str], tuple[Any, ...]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().partition(".")[0]
        if name.startswith(NAMESPACE):
            assert not kwargs
            kind = ", ".join(_kind(arg) for arg in args)
            self.calls.setdefault((name, kind), torch.utils._pytree.tree_map(_copy, args))
        return func(*args, **(kwargs or {}))


def _kind(arg: Any) -> str:
    """What makes a call another one: the types, and which optional tensors are there."""
    if isinstance(arg, Tensor):
        return str(arg.dtype)
    return f"[{_kind(arg[0])}]" if isinstance(arg, list) else str(arg)


def _copy(x: Any) -> Any:
    # Cut from the graph, in the same layout.
    return x.detach().clone(memory_format=torch.preserve_format) if isinstance(x, Tensor) else x


def _calls() -> dict[tuple[str, str], tuple[Any, ...]]:
    """Calls of our custom operators that running every operation gives, backward included."""
    with _Calls() as found:
        for operation in operations():
            for more in [{}, {"dropout": 0.25}] if operation in DROPOUTS else [{}]:
                for dtype, variant, n in (
                    (torch.bfloat16, "masked", 5),
                    (torch.float32, "plain", 5),
                    (torch.float32, "masked", 8),
                    (torch.float32, "masked", 9),
                ):
                    _run_torch(build(operation, n, variant, 0, **more), dtype)
        _run_in_place()
        nearest_neighbours(torch.randn(2, 9, 3), 4)
        nearest_neighbours(torch.randn(2, 9, 3), 4, torch.arange(9).expand(2, 9) < 7)
    return {(name, str(i)): args for i, ((name, _), args) in enumerate(found.calls.items())}


def _run_torch(case: Case, dtype: torch.dtype) -> None:
    x: dict[str, Any] = dict(case.values)
    for name, value in x.items():
        if value is not None and value.is_floating_point():
            held = torch.float32 if name in case.points else dtype
            x[name] = value.to(held).requires_grad_(name not in case.constants)
    if "logit_dropout" in case.options:
        return
    with required(case.operation, "torch") as config:
        outputs = case.call(x, config)
    torch.stack([out.float().square().sum() for out in outputs]).sum().backward()


def _run_in_place() -> None:
    """The fused pass may overwrite z where no gradient is asked for."""
    from foldkernels.kernels.edge_transition_attention import edge_transition_attention

    case = build("edge_transition_attention", 5, "masked")
    x = {name: None if v is None else v.float() if v.is_floating_point() else v for name, v in case.values.items()}
    weights = "weight_1 bias_1 weight_2 bias_2 weight_out bias_out norm_weight norm_bias".split()
    queries = "q k v q_points k_points v_points point_weights bias_weight mask".split()
    with required(case.operation, "torch") as config, torch.no_grad():
        for keep_z in (True, False):
            edge_transition_attention(
                x["nodes"],
                x["z"].clone(),
                tuple(x[name] for name in weights),
                *(x[name] for name in queries),
                keep_z=keep_z,
                overwrite_z=True,
                config=config,
            )


CALLS = _calls()


def test_every_custom_operator_is_called():
    gc.collect()
    ours = {name for name in OPDEFS if name.startswith(NAMESPACE)}
    assert ours and ours == {name for name, _ in CALLS}


@pytest.mark.parametrize(("name", "call"), sorted(CALLS))
def test_opcheck(name, call):
    """Schema, fake implementation, autograd registration, and tracing with unknown sizes."""
    args = torch.utils._pytree.tree_map(_copy, CALLS[name, call])
    opdef = OPDEFS[name]
    mutates = any(a.alias_info is not None and a.alias_info.is_write for a in opdef._opoverload._schema.arguments)
    if not name.endswith("_backward") and not mutates:
        # A backward operator has no derivative, and says so; the forward ones are checked with theirs.
        args = torch.utils._pytree.tree_map(_with_gradient, args)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # Tracing costs seconds: the last of an operator's calls, which has every optional tensor, stands for the others.
    traced = max((int(other) for op, other in CALLS if op == name)) == int(call)
    torch.library.opcheck(opdef, args, test_utils=[*checks, "test_aot_dispatch_dynamic"] if traced else checks)


def _with_gradient(x: Any) -> Any:
    return x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x


# Operations -----------------------------------------------------------------------------------------------------------


def _inputs(case: Case, grad: bool) -> dict[str, Any]:
    x: dict[str, Any] = {}
    for name, value in case.values.items():
        if value is not None and value.is_floating_point():
            value = value.float().requires_grad_(grad and name not in case.constants)
        x[name] = value
    return x


def _gradients(outputs: tuple[Tensor, ...], x: dict[str, Any]) -> list[Tensor]:
    leaves = [value for value in x.values() if value is not None and value.requires_grad]
    return list(torch.autograd.grad(torch.stack([out.square().sum() for out in outputs]).sum(), leaves))


def _odd(n: int) -> int:
    """Lengths for which a case has the same optional inputs: 1 mod 2, 0 mod 3."""
    return n // 6 * 6 + 3


@pytest.mark.parametrize(
    ("kernel", "grad"),
    [("torch", True), *(pytest.param(*how, marks=pytest.mark.slow) for how in (("reference", True), ("torch", False)))],
)
@pytest.mark.parametrize("operation", operations())
def test_operation(operation, kernel, grad):
    """Whole graphs, two of them at most for five lengths, and the numbers of the eager call."""
    # What AOTAutograd adds is a matter of custom operators and their gradients.
    counter = CompileCounterWithBackend("aot_eager" if grad and kernel == "torch" else "eager")
    with required(operation, kernel) as config:
        call = torch.compile(lambda x, call: call(x, config), fullgraph=True, backend=counter)
        # One builder's function: another closure would be another graph.
        function = build(operation, _odd(9), "masked").call
        for n in (9, 39, 33, 21, 27):  # not 15: attention_pair_bias then has other keys, which is another graph
            assert n == _odd(n)
            case = build(operation, n, "masked")
            x, y = _inputs(case, grad), _inputs(case, grad)
            with torch.set_grad_enabled(grad), registry.record_kernels() as ran:
                outputs = call(x, function)
            assert not ran or set(ran) == {f"{operation}: {kernel}"}
            expected = function(y, config)
            for out, true in zip(outputs, expected, strict=True):
                torch.testing.assert_close(out, true, rtol=1e-5, atol=1e-5)
            if grad:
                for out, true in zip(_gradients(outputs, x), _gradients(expected, y), strict=True):
                    torch.testing.assert_close(out, true, rtol=1e-4, atol=1e-4)
    assert 1 <= counter.frame_count <= 2, f"{counter.frame_count} graphs for five lengths"


def test_under_an_unbound_configuration(monkeypatch):
    """A call without a token reads the environment, compiled too."""
    case = build("edge_transition", 9, "masked")
    for kernel in ("reference", "torch"):
        torch._dynamo.reset()
        monkeypatch.setenv("FOLDKERNELS_KERNEL", kernel)
        with registry.record_kernels() as ran:
            torch.compile(lambda x: case.call(x, ""), fullgraph=True, backend="eager")(_inputs(case, False))
        assert set(ran) == {f"edge_transition: {kernel}"}


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A second kernel of the edge transition, for 20 residues and more, which the presets prefer."""
    kernels = registry.kernels("edge_transition")

    def supports(request: Request) -> list[Reason]:
        return [] if request.dims["n"] >= 20 else [Reason("it is for 20 residues and more")]

    kept = dict(registration._kernels["edge_transition"])
    registry.register(
        operation="edge_transition", name="late", supports=supports, load=kernels["reference"].load, thresholds=(20,)
    )
    monkeypatch.setattr(
        choice,
        "candidates",
        lambda preset, operation, device: (
            *(("late",) if operation == "edge_transition" else ()),
            *candidates(preset, operation, device),
        ),
    )
    yield "late"
    registration._kernels["edge_transition"] = kept
    registry.register(kept["torch"])  # forgets every answer


def test_one_graph_a_class(late):
    """A kernel with a threshold: lengths on either side, each side its own kernel and one graph."""
    counter = CompileCounterWithBackend("aot_eager")
    config = registry.token(KernelConfig(preset="torch"))
    function = build("edge_transition", 9, "masked").call
    call = torch.compile(lambda x: function(x, config), fullgraph=True, backend=counter, dynamic=True)
    seen: dict[int, str] = {}
    for n in (19, 20, 9, 33, 12, 40, 21):
        with registry.record_kernels() as ran:
            out = call(_inputs(build("edge_transition", n, "masked"), False))[0]
        assert out.shape[1] == n
        if ran:
            seen[n] = ran[-1]
    assert seen == {19: "edge_transition: torch", 20: "edge_transition: late"}
    assert counter.frame_count == 2


def test_eager_calls_follow_thresholds(late):
    config = registry.token(KernelConfig(preset="torch"))
    for n, kernel in ((19, "torch"), (20, "late"), (9, "torch"), (33, "late")):
        case = build("edge_transition", n, "masked")
        with registry.record_kernels() as ran:
            case.call(_inputs(case, False), config)
        assert ran == [f"edge_transition: {kernel}"]


# Modules --------------------------------------------------------------------------------------------------------------

SECTION = SimpleNamespace(
    c_s=16, c_z=8, c_hidden=4, no_heads=2, no_qk_points=2, no_v_points=3, dropout=0.0,
    seq_tfmr_num_heads=2, seq_tfmr_num_layers=1, num_blocks=2,
)  # fmt: skip
NODES = SimpleNamespace(
    c_s=16, c_pos_emb=6, c_timestep_emb=6, embed_chain=True, embed_aatype=True, use_mlp=True, aatype_pred_num_tokens=21
)
EDGES = SimpleNamespace(c_s=16, c_p=8, feat_dim=6, num_bins=22, embed_chain=True, embed_diffuse_mask=True)


class _OfFrames(nn.Module):
    """A module whose frames come as two tensors."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, s: Tensor, z: Tensor, rotmats: Tensor, trans: Tensor, mask: Tensor, *more: Tensor) -> Any:
        out = self.inner(s, z, Rigid(rotmats, trans), mask, *more)
        return (out[0], out[1].get_trans()) if isinstance(out, tuple) else out


class _OfNodes(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, time: Tensor, ones: Tensor, types: Tensor, logits: Tensor) -> Any:
        return self.inner(
            so3_t=time, r3_t=time, cat_t=time, res_mask=ones, diffuse_mask=ones, chain_index=ones, pos=types,
            aatypes=types, aatypes_sc=logits,
        )  # fmt: skip


def _modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    made = {
        "InvariantPointAttention": _OfFrames(InvariantPointAttention(SECTION)),
        "EdgeTransition": EdgeTransition(node_embed_size=16, edge_embed_in=8, edge_embed_out=8),
        "EdgeFeatureNet": EdgeFeatureNet(EDGES),
        "NodeFeatureNet": _OfNodes(NodeFeatureNet(NODES)),
        "SequenceTransformer": SequenceTransformer(16, 2, 2, 0.1),
        "StructureModuleTransition": StructureModuleTransition(16),
        "BackboneUpdate": BackboneUpdate(16),
        "TorsionAngles": TorsionAngles(16, 7),
        "Trunk": _OfFrames(Trunk(SECTION, 8, 0.1)),
    }
    for module in made.values():
        for parameter in module.parameters():  # layers that start as zeros would hide what they multiply
            nn.init.normal_(parameter, std=0.2)
    return made


def _given(name: str, n: int) -> tuple[Any, ...]:
    torch.manual_seed(n)
    s, z, xyz = torch.randn(2, n, 16), torch.randn(2, n, n, 8), torch.randn(2, n, 3)
    mask, ones = torch.ones(2, n), torch.ones(2, n)
    mask[0, n // 2 :] = 0.0
    rotmats = torch.linalg.qr(torch.randn(2, n, 3, 3))[0]
    return {
        "InvariantPointAttention": (s, z, rotmats, xyz, mask, mask[:, :, None] * mask[:, None]),
        "EdgeTransition": (s, z, mask),
        "EdgeFeatureNet": (s, 5 * xyz, xyz, mask[:, :, None] * mask[:, None], ones, ones),
        "NodeFeatureNet": (torch.rand(2, 1), ones, torch.arange(n).expand(2, n) % 20, torch.randn(2, n, 21)),
        "SequenceTransformer": (s, mask > 0.5),
        "StructureModuleTransition": (s,),
        "BackboneUpdate": (s,),
        "TorsionAngles": (s,),
        "Trunk": (s, z, rotmats, xyz, mask > 0.5, ones),
    }[name]


CALLING = ("EdgeFeatureNet", "EdgeTransition", "InvariantPointAttention", "SequenceTransformer", "Trunk")
QUICK = {("InvariantPointAttention", "reference"), ("InvariantPointAttention", None), ("EdgeTransition", "reference")}
BINDINGS = [
    pytest.param(
        name, *how, marks=[] if name not in CALLING or how[1] or (name, how[0]) in QUICK else [pytest.mark.slow]
    )
    for name in sorted(_modules())
    for how in ([("torch", True), ("reference", False), (None, False)] if name in CALLING else [(None, True)])
]


@pytest.mark.parametrize(("name", "kernel", "training"), BINDINGS)
def test_module(name, kernel, training):
    """Whole graphs, two at most for five lengths, and the numbers of the eager module, gradients among them."""
    module = _modules()[name].eval()  # dropout would draw other numbers
    if kernel is not None:
        bind(module, kernel)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    parameters = list(module.parameters())
    for n in LENGTHS:
        given = _given(name, n)
        with torch.set_grad_enabled(training):
            out, true = compiled(*given), module(*given)
        torch.testing.assert_close(out, true, rtol=1e-4, atol=1e-4)
        if training:
            ours, theirs = (torch.autograd.grad(_sum(x), parameters, allow_unused=True) for x in (out, true))
            for mine, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
    assert 1 <= counter.frame_count <= 2, f"{counter.frame_count} graphs for five lengths"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "Trunk" else []) for name in CALLING]
)
def test_every_size_dynamic(name):
    """`dynamic=True` makes widths symbols, too; the choice of a kernel takes them as the numbers they are."""
    module = _modules()[name].eval()
    bind(module, "torch")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for n in LENGTHS[:3]:
            torch.testing.assert_close(compiled(*_given(name, n)), module(*_given(name, n)), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def _sum(x: Any) -> Tensor:
    return torch.stack([part.square().sum() for part in (x if isinstance(x, tuple) else (x,))]).sum()


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler")
def test_inductor():
    """The compiler that users get, once: forward and backward of a module with two kernels' neighbours to fuse with."""
    module = _modules()["InvariantPointAttention"].eval()
    bind(module, "torch")
    given = _given("InvariantPointAttention", 12)
    out, true = torch.compile(module, fullgraph=True)(*given), module(*given)
    torch.testing.assert_close(out, true, rtol=1e-4, atol=1e-4)
    parameters = list(module.parameters())
    for mine, other in zip(*(torch.autograd.grad(_sum(x), parameters) for x in (out, true)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
