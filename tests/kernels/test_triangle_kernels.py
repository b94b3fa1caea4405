"""Triangle attention, its whole update, triangle multiplication, attention with a pair bias: every kernel of ours.

`reference` in float64 is the truth; the formulas that the benchmarks measure against, written apart from it, say the
same. What holds for every kernel of every operation is in `test_kernel_contract.py`.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.studies import original_triangle
from foldkernels.configs.kernel import KernelConfig
from foldkernels.kernels import triangle_attention_update as update
from foldkernels.kernels.attention_pair_bias import PairProjection, attention_pair_bias, pair_bias
from foldkernels.kernels.biased_attention import streaming
from foldkernels.kernels.common import blocking
from foldkernels.kernels.common.double_backward import NoDoubleBackward
from foldkernels.kernels.registry import record_kernels, token
from foldkernels.kernels.testing.cases.builders import varied
from foldkernels.kernels.testing.cases.case import Case
from foldkernels.kernels.testing.cases.random_inputs import Draws
from foldkernels.kernels.testing.rounded_operators import plain_pytorch
from foldkernels.kernels.triangle_attention import triangle_attention
from foldkernels.kernels.triangle_multiplication import Weights, _channels, triangle_multiplication

from ..support.triangle import LAYOUTS, golden, leaves_of, run, worst

OPERATIONS = ["attention_pair_bias", "triangle_attention", "triangle_attention_update", "triangle_multiplication"]
KERNELS = ("reference", "torch")
each_operation = pytest.mark.parametrize("operation", OPERATIONS)
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def words(operation: str, kernel: str) -> str:
    """The configuration under which an operation runs a kernel; the update goes with triangle attention."""
    name = operation.removesuffix("_update")
    return token(KernelConfig.model_validate({"preset": kernel, name: kernel}))


def called(case: Case, kernel: str) -> Any:
    def function(x: Mapping[str, Any]) -> Tensor:
        with record_kernels() as ran:
            (out,) = case.call(x, words(case.operation, kernel))
        assert ran == [f"{case.operation}: {kernel}"]
        return out

    return function


@pytest.fixture
def poisoned():
    """Memory that was asked for and not yet written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.use_deterministic_algorithms(before)


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("n", [1, 2, 5, 12, 17])
@each_operation
def test_streamed_is_the_definition(operation, n, layout, poisoned):
    """Forward and every gradient, in float64, however the inputs lie; several masks, one item empty."""
    case = varied(operation, n, 3, True, 0, n)
    truth = run(case, called(case, "reference"), leaves_of(case, torch.float64, layout))
    got = run(case, called(case, "torch"), leaves_of(case, torch.float64, layout))
    error, name = worst(got, truth)
    assert error < 1e-12, (name, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_operation
def test_streamed_is_as_good_as_the_definition(operation, dtype, poisoned):
    """In float32 and bfloat16: at most twice plain PyTorch's error, plus the floor."""
    case = varied(operation, 13, 2, True, 1, 3)
    values = {
        name: value if value is None or not value.is_floating_point() else value.to(dtype).double()
        for name, value in case.values.items()
    }
    rounded = dataclasses.replace(case, values=values)
    truth = run(rounded, called(case, "reference"), leaves_of(rounded, torch.float64))
    with plain_pytorch(dtype):
        plain = run(rounded, called(case, "reference"), leaves_of(rounded, dtype))
    got = run(rounded, called(case, "torch"), leaves_of(rounded, dtype))
    floor = 1e-6 if dtype is torch.float32 else 2e-3
    for name, true in truth.items():
        ours, theirs = ((x[name].double() - true).abs().max() for x in (got, plain))
        assert got[name].dtype is plain[name].dtype
        assert ours <= 2 * theirs + floor * true.abs().max(), name


@pytest.mark.parametrize("pairs", [1, 3, 40])
@each_operation
def test_blocks_of_any_size(operation, pairs, monkeypatch, poisoned):
    """A few logits at a time: rows one by one, and queries of a row in several goes."""
    case = varied(operation, 12, 2, True, 0, 5)
    truth = run(case, called(case, "reference"), leaves_of(case, torch.float64))
    monkeypatch.setattr(blocking, "_PAIRS_PER_THREAD", dict.fromkeys((torch.float64,), pairs))
    monkeypatch.setattr(streaming, "_LOGITS_PER_PAIR", 20)
    error, name = worst(run(case, called(case, "torch"), leaves_of(case, torch.float64)), truth)
    assert error < 1e-12, (name, error)


@each_kernel
@each_operation
def test_gradients_by_finite_differences(operation, kernel):
    for n in (2, 3):
        case = varied(operation, n, 2, True, 0, n)
        x = leaves_of(case, torch.float64)
        names = [name for name, value in x.items() if value is not None and value.requires_grad]

        def function(*some: Tensor, case=case, x=x, names=names) -> Tensor:
            return called(case, kernel)({**x, **dict(zip(names, some, strict=True))})

        assert torch.autograd.gradcheck(function, [x[name] for name in names], fast_mode=True, atol=1e-6)


@each_kernel
@each_operation
def test_nothing_is_changed_and_nothing_is_shared(operation, kernel):
    """Inputs stay as they are, and an output that a caller writes to is nobody else's."""
    case = varied(operation, 6, 2, True, 0, 1)
    x = leaves_of(case, torch.float32)
    before = {name: value.detach().clone() for name, value in x.items() if value is not None}
    with torch.no_grad():
        out = called(case, kernel)(x)
        out.fill_(7.0)
    for name, value in before.items():
        assert torch.equal(x[name], value), name


@each_operation
def test_under_autocast(operation):
    """bfloat16 in, out and inside, whichever kernel runs, and gradients in the type of what they belong to."""
    case = varied(operation, 9, 2, True, 1, 2)
    x = leaves_of(case, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = {kernel: called(case, kernel)(x) for kernel in KERNELS}
    largest = float(outs["reference"].detach().abs().max())
    for out in outs.values():
        assert out.dtype is torch.bfloat16
        torch.testing.assert_close(out, outs["reference"], rtol=0.02, atol=0.02 * largest)
        out.float().square().sum().backward()
    assert {value.grad.dtype for value in x.values() if value is not None and value.requires_grad} == {torch.float32}


@each_operation
def test_a_second_derivative_is_refused_with_the_way_out(operation):
    case = varied(operation, 4, 1, True, 0, 4)
    x = leaves_of(case, torch.float64)
    first = next(value for value in x.values() if value is not None and value.requires_grad)
    (gradient,) = torch.autograd.grad(called(case, "torch")(x).sum(), first, create_graph=True)
    with pytest.raises(NoDoubleBackward, match=rf"{operation}: .*\{{{operation.removesuffix('_update')}: reference\}}"):
        gradient.square().sum().backward()
    (gradient,) = torch.autograd.grad(called(case, "reference")(x).square().sum(), first, create_graph=True)
    gradient.square().sum().backward()


# Compiled -------------------------------------------------------------------------------------------------------------


@each_operation
def test_operators_are_what_they_claim(operation):
    """Fake tensors, autograd registration, schemas."""
    case = varied(operation, 5, 2, True, 0, 5)
    x = leaves_of(case, torch.float32)
    seen: list[tuple[Any, tuple[Any, ...]]] = []

    class Collect(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "foldkernels":
                seen.append((func, args))
            return func(*args, **(kwargs or {}))

    with Collect():
        called(case, "torch")(x).sum().backward()
    assert len(seen) >= 2
    for operator, arguments in seen:
        detached = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), arguments)
        if not str(operator).endswith("_backward.default"):
            detached = torch.utils._pytree.tree_map_only(
                torch.Tensor, lambda t: t.requires_grad_() if t.is_floating_point() else t, detached
            )
        torch.library.opcheck(operator, detached)


@each_operation
def test_one_graph_for_many_lengths(operation):
    """Whole graphs, and at most two for five lengths of one class."""
    graphs = 0

    def count(graph, _):
        nonlocal graphs
        graphs += 1
        return graph

    torch._dynamo.reset()
    config = words(operation, "torch")
    compiled = torch.compile(lambda call, x: call(x, config)[0], backend=count, fullgraph=True, dynamic=None)
    r = Draws(0)
    for n in (4, 5, 7, 8, 10):
        x, call = _simple(operation, n, r)
        (expected,) = call(x, config)
        torch.testing.assert_close(compiled(call, x), expected)
    assert graphs <= 2
    torch._dynamo.reset()


def _simple(operation: str, n: int, r: Draws) -> tuple[dict[str, Any], Any]:
    """The same call at any length: nothing in it depends on that but the shapes."""
    h, d, cz = 2, 4, 8
    z, mask = r.normal(2, n, n, cz).float(), r.mask(2, n, n)
    if operation == "triangle_attention":
        q = r.normal(3, 2, h, n, n, d).float()
        return {"q": q, "bias": r.normal(2, h, n, n).float(), "mask": mask}, _call_attention
    if operation == "attention_pair_bias":
        q = r.normal(3, 2, n, h, d).float()
        return {"q": q, "z": z, "mask": mask[:, 0], "weight": r.linear(h, cz).float()}, _call_pair_bias
    sizes = {
        "triangle_attention_update": [(cz,), (cz,), (h, cz), *[(h * d, cz)] * 4, (cz, h * d)],
        "triangle_multiplication": [(cz,), (cz,), (10, cz), (10, cz), (5,), (5,), (cz, 5), (cz, cz)],
    }[operation]
    weights = [Draws(i).weight(*size).float() for i, size in enumerate(sizes)]
    call = _call_update if operation == "triangle_attention_update" else _call_multiplication
    return {"z": z, "mask": mask, "weights": weights}, call


def _call_attention(x, config):
    return (triangle_attention(*x["q"], x["bias"], x["mask"], config=config),)


def _call_pair_bias(x, config):
    how = PairProjection(None, None, x["weight"])
    return (attention_pair_bias(*x["q"], x["mask"], z=x["z"], projection=how, config=config),)


def _call_update(x, config):
    weights = update.Weights(*x["weights"])
    return (update.triangle_attention_update(x["z"], x["mask"], weights, ending=True, config=config),)


def _call_multiplication(x, config):
    return (triangle_multiplication(x["z"], x["mask"], Weights(*x["weights"]), "incoming", config=config),)


# What the operations mean ---------------------------------------------------------------------------------------------


@each_kernel
def test_ending_node_is_starting_node_on_the_transpose(kernel):
    """With an asymmetric mask, in value and in gradient; and the direction matters."""
    case = varied("triangle_attention_update", 7, 2, True, 0, 7)
    config, x = words("triangle_attention", kernel), leaves_of(case, torch.float64)
    weights = update.Weights(*(x[name] for name in list(case.values)[2:]))
    z, mask = x["z"], x["mask"]
    assert z is not None and mask is not None and not torch.equal(mask, mask.transpose(1, 2))
    ending = update.triangle_attention_update(z, mask, weights, ending=True, config=config)
    starting = update.triangle_attention_update(z.transpose(1, 2), mask.transpose(1, 2), weights, config=config)
    torch.testing.assert_close(ending, starting.transpose(1, 2), rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(ending)
    torch.testing.assert_close(
        torch.autograd.grad(ending, z, cotangent), torch.autograd.grad(starting.transpose(1, 2), z, cotangent)
    )
    other = update.triangle_attention_update(z, mask, weights, config=config)
    assert (ending - other).abs().max() > 0.1


@each_kernel
def test_incoming_is_outgoing_on_the_transpose_of_the_factors(kernel):
    """With the mask transposed as well, and both factors' roles kept: the gate outside sees z as it is."""
    case = varied("triangle_multiplication", 6, 1, True, 0, 6)
    x = leaves_of(case, torch.float64)
    weights, config = Weights(*(x[name] for name in list(case.values)[2:])), words("triangle_multiplication", kernel)
    z = x["z"] + x["z"].transpose(1, 2)  # symmetric, so that only the mask tells the directions apart
    mask = x["mask"]
    incoming = triangle_multiplication(z, mask, weights, "incoming", config=config)
    outgoing = triangle_multiplication(z, mask.transpose(1, 2), weights, "outgoing", config=config)
    torch.testing.assert_close(incoming, outgoing, rtol=1e-12, atol=1e-12)
    assert (incoming - triangle_multiplication(z, mask, weights, "outgoing", config=config)).abs().max() > 0.01


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_without_keys_are_zero_and_pass_nothing(kernel):
    for operation in ("triangle_attention", "attention_pair_bias"):
        case = varied(operation, 8, 2, True, 0, 2)
        x = leaves_of(case, torch.float64)
        got = run(case, called(case, kernel), x)
        (gone,) = case.gone_outputs
        assert gone.any() and not got["out"][gone].any() and got["out"][~gone].any()
        for name, places in case.gone_values.items():
            assert not got[name][places].any(), name


@each_kernel
def test_what_masked_keys_hold_is_not_seen(kernel):
    for operation in ("triangle_attention", "attention_pair_bias"):
        case = varied(operation, 9, 2, True, 0, 2)
        values = dict(case.values)
        for name, places in case.hidden.items():
            values[name] = values[name].clone()
            values[name][places] = 1e4
        before, after = (
            run(some, called(case, kernel), leaves_of(some, torch.float32))
            for some in (case, dataclasses.replace(case, values=values))
        )
        error, name = worst(after, before)
        assert error < 1e-6, name


@each_kernel
def test_sequences_share_a_pair_tensor_in_order(kernel):
    """Items i * k to (i + 1) * k attend under bias i; masks may be the pair tensors', or each sequence's own."""
    r = Draws(3)
    q, k, v = (r.normal(6, 5, 2, 4) for _ in range(3))
    bias, mask = r.normal(2, 2, 5, 5), r.mask(2, 5)
    mask[1] = torch.tensor([True, False, True, True, False])
    config = words("attention_pair_bias", kernel)
    shared = attention_pair_bias(q, k, v, mask, bias=bias, config=config)
    own = attention_pair_bias(q, k, v, mask.repeat_interleave(3, 0), bias=bias, config=config)
    apart = attention_pair_bias(q, k, v, mask.repeat_interleave(3, 0), bias=bias.repeat_interleave(3, 0), config=config)
    torch.testing.assert_close(shared, own)
    torch.testing.assert_close(shared, apart)


def test_the_projected_bias_can_be_kept():
    """`pair_bias` and then the attention is the attention with z, gradients too; the LayerNorm may be missing."""
    r = Draws(4)
    q, k, v = (r.normal(2, 5, 3, 4).requires_grad_() for _ in range(3))
    z = r.normal(2, 5, 5, 6).requires_grad_()
    how = PairProjection(*(w.requires_grad_() for w in (r.weight(6), r.weight(6), r.linear(3, 6))), 1e-3)
    leaves = (q, k, v, z, *how[:3])
    outs = [
        attention_pair_bias(q, k, v, None, **how_)
        for how_ in ({"z": z, "projection": how}, {"bias": pair_bias(z, *how)})
    ]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), leaves) for out in outs))
    plain = torch.einsum("bijc,hc->bhij", z, how.weight)
    torch.testing.assert_close(pair_bias(z, None, None, how.weight), plain)
    assert pair_bias(z.bfloat16(), None, None, how.weight.bfloat16()).dtype is torch.float32


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({}, "either `bias`, or `z`"),
        ({"z": torch.zeros(2, 5, 5, 6)}, "either `bias`, or `z`"),
        ({"bias": torch.zeros(2, 3, 5, 5), "z": torch.zeros(2, 5, 5, 6)}, "either `bias`, or `z`"),
        ({"bias": torch.zeros(3, 3, 5, 5)}, "4 sequences cannot share 3 pair tensors"),
    ],
)
def test_a_pair_bias_that_makes_no_sense_is_refused(wrong, says):
    q = torch.zeros(4, 5, 3, 4)
    with pytest.raises(ValueError, match=says):
        attention_pair_bias(q, q, q, None, **wrong)


def test_a_direction_that_does_not_exist_is_refused():
    case = varied("triangle_multiplication", 3, 1, False, 0, 1)
    weights = Weights(*(case.values[name] for name in list(case.values)[2:]))
    with pytest.raises(ValueError, match="'outgoing' or 'incoming', not 'sideways'"):
        triangle_multiplication(case.values["z"], None, weights, "sideways")


def test_the_update_goes_with_triangle_attention():
    """In one pass where its kernel has one, in plain layers around it where it has none; the same numbers."""
    case = varied("triangle_attention_update", 6, 2, True, 1, 6)
    x = leaves_of(case, torch.float64)
    weights = update.Weights(*(x[name] for name in list(case.values)[2:]))
    found = {}
    for config in ({"preset": "torch"}, {"preset": "reference"}, {"preset": "auto", "triangle_attention": "reference"}):
        with record_kernels() as ran:
            words_ = token(KernelConfig.model_validate(config))
            out = update.triangle_attention_update(x["z"], x["mask"], weights, ending=True, eps=1e-3, config=words_)
        found[tuple(ran)] = out
    assert list(found) == [
        ("triangle_attention_update: torch",),
        ("triangle_attention_update: reference",),
        ("triangle_attention: reference",),
    ]  # fmt: skip
    for out in found.values():
        torch.testing.assert_close(out, found["triangle_attention_update: torch",], rtol=1e-11, atol=1e-11)


# Goldens: Boltz's modules, with their layers written out around the operations ----------------------------------------


def _error(got: Tensor, data: Mapping[str, Tensor], valid: Tensor) -> float:
    return float((got.detach().double() - data["out"])[valid].abs().max())


@each_kernel
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("ending", [False, True])
def test_boltz_triangle_attention(ending, ragged, kernel):
    name = f"tri_att_{'end' if ending else 'start'}{'_ragged' if ragged else ''}"
    data, w = golden("tri_att_N24", name, x="z", mask="pair_mask_ragged" if ragged else "pair_mask")
    names = ("layer_norm.weight", "layer_norm.bias", "linear.weight", *(f"mha.linear_{c}.weight" for c in "qkvgo"))
    weights = update.Weights(*(w[name] for name in names))
    mask, config = data["in.mask"] > 0.5, words("triangle_attention", kernel)
    valid = mask & mask.any(2 if not ending else 1, keepdim=True)
    x = data["in.x"].requires_grad_()
    whole = update.triangle_attention_update(x, mask, weights, ending=ending, config=config)
    layers = update.layers(x, mask, weights, ending=ending, eps=1e-5, config=config)
    for out in (whole, layers, original_triangle.triangle_attention(x, mask.float(), w, ending=ending)):
        assert _error(out, data, valid) < 5e-6
        if "grad.x" in data:
            (gradient,) = torch.autograd.grad(out, x, data["loss_w.0"])
            torch.testing.assert_close(gradient, data["grad.x"], rtol=1e-4, atol=1e-5)


@each_kernel
@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
def test_boltz_triangle_multiplication(direction, kernel):
    data, w = golden("N16", "tri_mul_out" if direction == "outgoing" else "tri_mul_in", x="z", mask="pair_mask_ragged")
    names = (
        "norm_in.weight norm_in.bias p_in.weight g_in.weight norm_out.weight norm_out.bias p_out.weight g_out.weight"
    )
    weights = Weights(*(w[name].requires_grad_() for name in names.split()))
    mask, x = data["in.mask"] > 0.5, data["in.x"].requires_grad_()
    out = triangle_multiplication(x, mask, weights, direction, config=words("triangle_multiplication", kernel))
    original = original_triangle.triangle_multiplication(x, mask.float(), w, incoming=direction == "incoming")
    for found in (out, original):
        assert _error(found, data, mask) < 5e-6
    leaves = dict(zip(names.split(), weights, strict=False))
    gradient, *of_weights = torch.autograd.grad(out, [x, *leaves.values()], data["loss_w.0"])
    torch.testing.assert_close(gradient, data["grad.x"], rtol=1e-4, atol=1e-5)
    for name, found in zip(leaves, of_weights, strict=True):
        torch.testing.assert_close(found, data[f"gradw.{name}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wider", [0, 3])
def test_bands_of_the_product(wider, dtype, direction, monkeypatch):
    """Bands of uneven height, with the result in the product's place (as wide as the product) and beside it."""
    n, cz = 7, 16
    r = Draws(5)
    shapes = {"norm_in_weight": (cz,), "norm_in_bias": (cz,), "p_in": (2 * (cz + wider), cz)}
    shapes |= {"g_in": (2 * (cz + wider), cz), "norm_out_weight": (cz + wider,), "norm_out_bias": (cz + wider,)}
    shapes |= {"p_out": (cz, cz + wider), "g_out": (cz, cz)}
    weights = Weights(*(r.weight(*shape, scale=shape[-1] ** -0.5).to(dtype) for shape in shapes.values()))
    z, mask = r.normal(2, n, n, cz).to(dtype), r.mask(2, n, n)
    given = z.clone()

    def update(kernel: str) -> torch.Tensor:
        wide = torch.float64 if kernel == "reference" else dtype
        config = words("triangle_multiplication", kernel)
        return triangle_multiplication(z.to(wide), mask, weights.to(wide), direction, config=config)

    truth, whole = update("reference"), update("torch")
    monkeypatch.setattr(_channels, "_BAND", 3)
    monkeypatch.setattr(_channels, "_CHANNELS", 5)
    monkeypatch.setattr(blocking, "_PAIRS_PER_THREAD", dict.fromkeys((torch.float32, torch.float64), 2 * n))
    cut = update("torch")
    assert torch.equal(z, given)
    bound = 2e-6 if dtype is torch.float32 else 2e-2
    for found in (whole, cut):
        assert float((found.double() - truth).abs().max() / truth.abs().max()) < bound


@each_kernel
@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
def test_a_masked_pair_is_no_edge(direction, kernel):
    """Whatever masked pairs hold, the others' updates stay the same; their own, which they gate, do not."""
    case = varied("triangle_multiplication", 8, 2, True, 0, 3)
    values = {name: None if value is None else value.clone() for name, value in case.values.items()}
    weights, mask = Weights(*list(values.values())[2:]), values["mask"]
    assert mask is not None and values["z"] is not None
    other = values["z"].clone()
    other[~mask] = 100.0 * other[~mask].square() + 37.0  # a LayerNorm would take out scale and shift
    config = words("triangle_multiplication", kernel)
    before, after = (triangle_multiplication(z, mask, weights, direction, config=config) for z in (values["z"], other))
    torch.testing.assert_close(after[mask], before[mask], rtol=1e-12, atol=1e-12)
    assert (after[~mask] - before[~mask]).abs().max() > 0.1


@each_kernel
@pytest.mark.parametrize("version", ["v1", "v2", "v2_precomputed_bias"])
def test_boltz_attention_pair_bias(version, kernel):
    data, w = golden("N16", f"attention_pair_bias_{version}", s="s", z="z", mask="mask")
    s, mask, linear = data["in.s"], data["in.mask"] > 0.5, original_triangle._linear
    if version == "v1":
        s = original_triangle._norm(s, w, "norm_s")
    keys = data.get("in.k_in", s)
    q, k, v = (linear(x, w, f"proj_{c}").unflatten(-1, (4, -1)) for x, c in ((s, "q"), (keys, "k"), (keys, "v")))
    if version == "v2_precomputed_bias":
        how: dict[str, Any] = {"bias": data["in.bias"].permute(0, 3, 1, 2)}
    else:
        projection = PairProjection(w["proj_z.0.weight"], w["proj_z.0.bias"], w["proj_z.1.weight"])
        how = {"z": data["in.z"], "projection": projection}
    attended = attention_pair_bias(q, k, v, mask, **how, config=words("attention_pair_bias", kernel))
    out = linear(attended.flatten(2) * linear(s, w, "proj_g").sigmoid(), w, "proj_o")
    assert _error(out, data, mask) < 5e-6
    if version != "v2_precomputed_bias":
        original = original_triangle.attention_pair_bias(
            data["in.s"], data["in.z"], mask.float(), w, heads=4, k_in=data.get("in.k_in")
        )
        assert _error(original, data, mask) < 5e-6
