"""cuEquivariance and trifast behind the triangle operations, on stand-ins written from their documentation.

Here is tested the translation: layouts, mask meanings, scale, rows without keys, what is cast. Whether the libraries do
what they document takes a GPU.
"""

import ast
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from foldkernels.kernels import registry
from foldkernels.kernels.attention_pair_bias import PairProjection
from foldkernels.kernels.attention_pair_bias import cuequivariance as pair_bias_kernel
from foldkernels.kernels.attention_pair_bias import reference as pair_bias_reference
from foldkernels.kernels.hardware import machine
from foldkernels.kernels.hardware.machine import MACHINES
from foldkernels.kernels.registry.types import Dims, Request
from foldkernels.kernels.testing.cases.random_inputs import Draws
from foldkernels.kernels.triangle_attention import cuequivariance as attention_kernel
from foldkernels.kernels.triangle_attention import reference as attention_reference
from foldkernels.kernels.triangle_attention import trifast as trifast_kernel
from foldkernels.kernels.triangle_multiplication import Weights
from foldkernels.kernels.triangle_multiplication import cuequivariance as multiplication_kernel
from foldkernels.kernels.triangle_multiplication import reference as multiplication_reference

from ..stand_ins import cuequivariance, trifast
from ..support.triangle import worst

Values = dict[str, Any]
KERNELS: dict[str, tuple[ModuleType, ModuleType, ModuleType]] = {
    "attention-cuequivariance": (attention_kernel, attention_reference, cuequivariance),
    "attention-trifast": (trifast_kernel, attention_reference, trifast),
    "multiplication-cuequivariance": (multiplication_kernel, multiplication_reference, cuequivariance),
    "pair_bias-cuequivariance": (pair_bias_kernel, pair_bias_reference, cuequivariance),
}
each_kernel = pytest.mark.parametrize("which", list(KERNELS))


@pytest.fixture(autouse=True)
def tf32_is_allowed():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def inputs(which: str, dtype: torch.dtype = torch.float64, masked: bool = True) -> tuple[Any, ...]:
    """What the kernel's `run` takes. Sizes differ where they may, masks and biases are asymmetric, a row is empty."""
    r = Draws(7)
    n, h, d = 6, 3, 16
    mask = r.mask(2, n, n) if masked else None
    if mask is not None:
        mask[1] = r.mask(1, n, n)[0]
    if which.startswith("attention"):
        q, k, v = (r.normal(2, h, n, n, d, scale=0.6) for _ in range(3))
        given: tuple[Any, ...] = (q, k, v, r.normal(2, h, n, n), mask)
    elif which.startswith("pair_bias"):
        q, k, v = (r.normal(4, n, h, d, scale=0.6) for _ in range(3))
        how = PairProjection(r.weight(8), r.weight(8), r.linear(h, 8), 1e-3)
        keys = None if mask is None else torch.cat([mask[0, [0, 2]], mask[1, [3, 1]]])
        given = (q, k, v, r.normal(2, n, n, 8), keys, how)
    else:
        c = 32
        weights = Weights(
            r.weight(c), r.weight(c), r.linear(2 * c, c), r.linear(2 * c, c), r.weight(c), r.weight(c),
            r.linear(c, c), r.linear(c, c), None, r.weight(2 * c), r.weight(c), None,
        )  # fmt: skip
        given = (r.normal(2, n, n, c), mask, weights, "outgoing", 1e-3)
    return torch.utils._pytree.tree_map_only(
        Tensor, lambda x: x.to(dtype).requires_grad_() if x.is_floating_point() else x, given
    )


def outcome(run: Callable[..., Tensor], given: tuple[Any, ...]) -> dict[str, Tensor]:
    """The output and the gradient of every input, by number."""
    leaves = [x for x in torch.utils._pytree.tree_leaves(given) if isinstance(x, Tensor) and x.is_floating_point()]
    out = run(*given)
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(out, leaves, cotangent.to(out.dtype), allow_unused=True)
    found = (torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))
    return {"out": out.detach(), **{str(i): g for i, g in enumerate(found)}}


def error(which: str, library: Any, monkeypatch: pytest.MonkeyPatch, masked: bool = True, **more: Any) -> float:
    """The largest relative error, forward or in a gradient, of the kernel with a library in place of the real one."""
    kernel, reference, _ = KERNELS[which]
    monkeypatch.setattr(kernel, "library", library, raising=False)
    given = inputs(which, torch.float32, masked)
    return worst(outcome(kernel.run, given), outcome(reference.run, given))[0]


@each_kernel
@pytest.mark.parametrize("masked", [True, False])
def test_the_translation_is_right(which, masked, monkeypatch):
    assert error(which, KERNELS[which][2], monkeypatch, masked) < 2e-5


@pytest.mark.parametrize("which", ["attention-cuequivariance", "attention-trifast", "pair_bias-cuequivariance"])
def test_rows_without_keys_are_zero_and_pass_nothing(which, monkeypatch):
    kernel, _, library = KERNELS[which]
    monkeypatch.setattr(kernel, "library", library, raising=False)
    given = inputs(which, torch.float32)
    mask = next(x for x in given if isinstance(x, Tensor) and x.dtype is torch.bool)
    empty = ~mask.any(-1)
    assert empty.any()
    found = outcome(kernel.run, given)
    for name in ("out", "0", "1", "2"):
        # rows of the attentions' tensors, whole items of the pair bias's
        rows = found[name].transpose(1, 2) if which.startswith("attention") else found[name]
        assert not rows[empty].any() and rows[~empty].any(), name


def test_the_direction_is_passed_on(monkeypatch):
    kernel, reference, library = KERNELS["multiplication-cuequivariance"]
    monkeypatch.setattr(kernel, "library", library, raising=False)
    given = list(inputs("multiplication-cuequivariance", torch.float32))
    given[3] = "incoming"
    torch.testing.assert_close(kernel.run(*given), reference.run(*given), rtol=1e-4, atol=1e-4)


# What must be seen ----------------------------------------------------------------------------------------------------


def _with(library: Any, name: str, change: Callable[[Values], Values]) -> Any:
    """A library whose function gets other arguments than it was called with."""
    original = getattr(library, name)

    def function(*args: Any, **kwargs: Any) -> Tensor:
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        return original(**change(dict(bound.arguments)))

    return SimpleNamespace(**{name: function})


def _flipped(x: Values) -> Values:
    mask = x["mask"]
    return {**x, "mask": ~mask if mask.dtype is torch.bool else 1 - mask}


def _ones(x: Values) -> Values:
    return {**x, "mask": torch.zeros_like(x["mask"]) if "b" in x else torch.ones_like(x["mask"])}


def _bias_transposed(x: Values) -> Values:
    name = "b" if "b" in x else "bias"
    return {**x, name: x[name].transpose(-1, -2)}


def _mask_transposed(x: Values) -> Values:
    """Rows and columns of the pair mask exchanged."""
    mask = x["mask"].squeeze()
    return {**x, "mask": mask.transpose(-1, -2).reshape(x["mask"].shape)}


def _queries_and_keys_exchanged(x: Values) -> Values:
    return {**x, "q": x["k"], "k": x["q"]}


def _heads_and_rows_exchanged(x: Values) -> Values:
    """As if rows and heads were read in the other order, with the same shape."""
    q = x["q"]
    return {**x, "q": q.transpose(1, 2).reshape(q.shape)}


def _no_scale(x: Values) -> Values:
    return {**x, "scale": 1.0} if "scale" in x else {**x, "q": x["q"] * x["q"].shape[-1] ** 0.5}


def _other_direction(x: Values) -> Values:
    return {**x, "direction": "incoming" if x["direction"] == "outgoing" else "outgoing"}


def _halves_exchanged(x: Values) -> Values:
    return {**x, **{name: x[name].roll(32, 0) for name in ("p_in_weight", "g_in_weight", "g_in_bias")}}


def _without(name: str) -> Callable[[Values], Values]:
    def change(x: Values) -> Values:
        return {**x, name: None}

    change.__name__ = f"_without_{name}"
    return change


def _other_eps(x: Values) -> Values:
    return {**x, "eps": 1e-5}


ATTENTION = (
    _flipped, _ones, _bias_transposed, _mask_transposed, _queries_and_keys_exchanged, _heads_and_rows_exchanged,
    _no_scale,
)  # fmt: skip
MUTATIONS = [
    *((which, "triangle_attention", change) for which in list(KERNELS)[:2] for change in ATTENTION),
    *(("pair_bias-cuequivariance", "triangle_attention", some) for some in ATTENTION if some is not _mask_transposed),
    *(
        ("multiplication-cuequivariance", "triangle_multiplicative_update", change)
        for change in (
            _flipped, _ones, _mask_transposed, _other_direction, _halves_exchanged, _other_eps,
            *(_without(f"{layer}_weight") for layer in ("norm_in", "p_in", "g_in", "norm_out", "p_out", "g_out")),
            *(_without(bias) for bias in ("norm_in_bias", "norm_out_bias", "g_in_bias", "p_out_bias")),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("which", "name", "change"), [pytest.param(*m, id=f"{m[0]}-{m[2].__name__.strip('_')}") for m in MUTATIONS]
)
def test_a_wrong_translation_is_seen(which, name, change, monkeypatch):
    """Each mistake that a translation could make moves the result by more than a thousandth."""
    assert error(which, _with(KERNELS[which][2], name, change), monkeypatch) > 1e-3


# The real libraries' signatures ---------------------------------------------------------------------------------------


def _function(source: Path, name: str) -> ast.FunctionDef:
    tree = ast.parse(source.read_text())
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)


def _arguments(function: ast.FunctionDef) -> list[tuple[str, str]]:
    """Names and kinds, in order."""
    given = function.args
    assert not given.posonlyargs and given.vararg is None and given.kwarg is None
    return [(a.arg, "either") for a in given.args] + [(a.arg, "keyword") for a in given.kwonlyargs]


def _defaults(function: ast.FunctionDef) -> list[Any]:
    """In order, whatever way numbers are written."""
    given = function.args
    return [ast.literal_eval(value) for value in (*given.defaults, *given.kw_defaults) if value is not None]


@pytest.mark.parametrize(
    ("package", "file", "name", "stand_in"),
    [
        ("cuequivariance_torch", "primitives/triangle.py", "triangle_attention", cuequivariance),
        ("cuequivariance_torch", "primitives/triangle.py", "triangle_multiplicative_update", cuequivariance),
        ("trifast", "torch.py", "triangle_attention", trifast),
    ],
)
def test_the_installed_library_has_the_stand_in_s_signature(package, file, name, stand_in):
    """Read, not imported: that would take a GPU."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    real = _function(Path(spec.origin).parent / file, name)
    ours = _function(Path(inspect.getfile(stand_in)), name)
    assert _arguments(real) == _arguments(ours)
    assert _defaults(real) == _defaults(ours)


@pytest.mark.parametrize(
    ("which", "package", "others"),
    [
        ("attention-cuequivariance", "cuequivariance_torch", ("cuequivariance_ops_torch",)),
        ("multiplication-cuequivariance", "cuequivariance_torch", ("cuequivariance_ops_torch",)),
        ("pair_bias-cuequivariance", "cuequivariance_torch", ("cuequivariance_ops_torch",)),
        ("attention-trifast", "trifast", ()),
    ],
)
def test_the_library_is_found_when_it_is_loaded(which, package, others, monkeypatch):
    """And not before: these files import where there is no GPU."""
    kernel, _, library = KERNELS[which]
    module = ModuleType(package)
    module.__dict__.update({name: value for name, value in vars(library).items() if not name.startswith("__")})
    module.__dict__.setdefault("attention_pair_bias", None)
    asked: list[str] = []
    monkeypatch.setitem(sys.modules, package, module)
    for other in others:
        ops = ModuleType(other)
        ops.__dict__["init_triton_cache"] = lambda: asked.append("cache")
        monkeypatch.setitem(sys.modules, other, ops)
    machine.refresh()
    monkeypatch.delattr(kernel, "library", raising=False)
    try:
        assert kernel.load() is kernel.run
        assert kernel.library is module
        assert asked == (["cache"] if which.startswith("multiplication") else [])
    finally:
        monkeypatch.undo()
        machine.refresh()


@pytest.mark.parametrize("which", ["attention-cuequivariance", "pair_bias-cuequivariance"])
def test_float32_gradients_need_tf32(which, monkeypatch):
    kernel, _, library = KERNELS[which]
    monkeypatch.setattr(kernel, "library", library, raising=False)
    torch.backends.cuda.matmul.allow_tf32 = False  # as it was before, once the test is over
    given = inputs(which, torch.float32)
    with pytest.raises(RuntimeError, match=r"allow_tf32 = True"):
        kernel.run(*given)
    with torch.no_grad():
        kernel.run(*given)
    kernel.run(*inputs(which, torch.bfloat16))


@each_kernel
def test_it_can_be_traced(which, monkeypatch):
    """What is ours around the library's call is one whole graph."""
    kernel, _, library = KERNELS[which]
    monkeypatch.setattr(kernel, "library", library, raising=False)
    torch._dynamo.reset()
    given = inputs(which, torch.float32)
    compiled = torch.compile(kernel.run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), kernel.run(*given))
    torch._dynamo.reset()


# The choice, on machines as data --------------------------------------------------------------------------------------

SIZES: Mapping[str, Mapping[str, int]] = {
    "triangle_attention": {"h": 4, "d": 32},
    "triangle_multiplication": {"cz": 128, "c": 128},
    "attention_pair_bias": {"h": 16, "d": 24},
}
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


def choose(operation: str, on: str, n: int, dtype: torch.dtype, config: Any = "auto", **more: Any) -> registry.Decision:
    there = MACHINES[on]
    sizes = {**SIZES[operation], **more.pop("sizes", {})}
    dims = Dims({registry.operations()[operation].length: n, **sizes})
    request = Request(operation, there.device, dtype, dims, capability=more.pop("capability", there.capability), **more)
    return registry.decide(request, config, there)


@pytest.mark.parametrize(
    ("operation", "on", "n", "dtype", "more", "expected"),
    [
        ("triangle_attention", "h100", 256, BF16, {}, "cuequivariance"),
        ("triangle_attention", "a100", 256, BF16, {"grad": True}, "cuequivariance"),
        ("triangle_attention", "h100", 101, BF16, {}, "cuequivariance"),
        ("triangle_attention", "h100", 100, BF16, {}, "trifast"),
        ("triangle_attention", "h100", 200, BF16, {"sizes": {"d": 16}}, "trifast"),
        ("triangle_attention", "h100", 201, BF16, {"sizes": {"d": 16}}, "cuequivariance"),
        ("triangle_attention", "h100", 256, F32, {}, "cuequivariance"),
        ("triangle_attention", "h100", 256, F32, {"grad": True}, "trifast"),
        ("triangle_attention", "h100", 256, F32, {"grad": True, "precision": "tf32"}, "cuequivariance"),
        ("triangle_attention", "h100", 256, F32, {"sizes": {"d": 64}}, "trifast"),
        ("triangle_attention", "h100", 256, BF16, {"sizes": {"d": 24}}, "cuequivariance"),
        ("triangle_attention", "h100", 100, BF16, {"sizes": {"d": 24}}, "torch"),
        ("triangle_attention", "h100", 256, BF16, {"sizes": {"d": 12}}, "torch"),
        ("triangle_attention", "h100", 256, F64, {}, "torch"),
        ("triangle_attention", "h100", 100, BF16, {"options": frozenset(["rectangular"])}, "torch"),
        ("triangle_attention", "h100", 256, BF16, {"options": frozenset(["rectangular"])}, "cuequivariance"),
        ("triangle_attention", "h100", 256, BF16, {"deterministic": True}, "torch"),
        ("triangle_attention", "h100", 256, BF16, {"capability": (10, 0)}, "trifast"),
        ("triangle_attention", "mac", 256, BF16, {}, "torch"),
        ("triangle_attention", "cpu", 256, F32, {}, "torch"),
        ("triangle_multiplication", "h100", 256, BF16, {"grad": True}, "cuequivariance"),
        ("triangle_multiplication", "h100", 256, F32, {"options": frozenset(["bias"])}, "cuequivariance"),
        ("triangle_multiplication", "h100", 100, BF16, {}, "torch"),
        ("triangle_multiplication", "h100", 256, BF16, {"sizes": {"cz": 48}}, "torch"),
        ("triangle_multiplication", "h100", 256, BF16, {"sizes": {"c": 48}}, "torch"),
        ("triangle_multiplication", "h100", 256, F64, {}, "torch"),
        ("triangle_multiplication", "mac", 256, F32, {}, "torch"),
        ("attention_pair_bias", "h100", 256, BF16, {}, "cuequivariance"),
        ("attention_pair_bias", "h100", 200, BF16, {}, "torch"),
        ("attention_pair_bias", "h100", 256, BF16, {"options": frozenset(["cross"])}, "torch"),
        ("attention_pair_bias", "cpu", 256, F32, {}, "torch"),
    ],
)  # fmt: skip
def test_what_auto_chooses(operation, on, n, dtype, more, expected):
    assert choose(operation, on, n, dtype, **dict(more)).kernel.name == expected


def test_presets_on_machines():
    """`flash` on a GPU is trifast; `cuequivariance` on a Mac is PyTorch, and says nothing."""
    assert choose("triangle_attention", "a100", 64, F32, "flash").kernel.name == "trifast"
    for operation in SIZES:
        decision = choose(operation, "mac", 256, F32, "cuequivariance")
        assert decision.kernel.name == "torch" and not decision.fell_back
        assert choose(operation, "h100", 256, BF16, "cuequivariance").kernel.name == "cuequivariance"
        assert choose(operation, "h100", 64, BF16, "cuequivariance").fell_back


def test_a_required_library_that_cannot_run_says_why_and_what_to_do():
    with pytest.raises(registry.KernelUnavailable) as refusal:
        wanted = {"triangle_attention": "cuequivariance"}
        choose("triangle_attention", "h100", 64, F32, wanted, sizes={"d": 33}, grad=True)
    for words in ("up to 100 tokens", "not a multiple of 4 up to 32", "precision: tf32", "fix:"):
        assert words in str(refusal.value)
    with pytest.raises(registry.KernelUnavailable, match="power of two"):
        choose("triangle_attention", "h100", 64, F32, {"triangle_attention": "trifast"}, sizes={"d": 24})
    with pytest.raises(registry.KernelUnavailable, match="not installed on a CPU"):
        choose("triangle_multiplication", "cpu", 256, F32, {"triangle_multiplication": "cuequivariance"})


@pytest.mark.parametrize("operation", sorted(SIZES))
def test_lengths_change_the_choice_at_declared_thresholds_only(operation):
    edges = registry.thresholds(operation)
    names = {n: choose(operation, "h100", n, BF16).kernel.name for n in range(1, 260)}
    changes = [n for n in range(2, 260) if names[n] != names[n - 1]]
    assert changes and set(changes) <= set(edges)
