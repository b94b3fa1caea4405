"""What every kernel of every operation must hold. A new kernel is found in the registry, and needs no edit here."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from foldkernels.kernels import registry
from foldkernels.kernels.common import blocking
from foldkernels.kernels.common.double_backward import NoDoubleBackward
from foldkernels.kernels.testing.accuracy import required, run
from foldkernels.kernels.testing.cases.builders import BUILDERS, DROPOUTS
from foldkernels.kernels.testing.cases.case import Case
from foldkernels.kernels.testing.cases.memory_layouts import VARIANTS
from foldkernels.kernels.testing.cases.random_inputs import Draws
from foldkernels.kernels.testing.contract_grid import truth_and_plain

from .kernel_cases import DEVICES, DTYPES, assert_all_as_good, build, case_for, kernels, operations, skip_unless_it_runs

LENGTHS = (1, 2, 7, 15, 16, 17, 31, 33, 64, 100, 101, 127, 129, 200, 201)
#: Lengths at which every layout is tried in `make test`; the rest are tried in `make test-all`.
EVERY_LAYOUT = (1, 2, 7, 17, 33)
#: The longest length of `make test`, and two more that are tried with masks.
SHORT, LONG = 64, (101, 129)
#: The length of `make test-versions`.
QUICK = 17
KERNELS = [pytest.param(*pair, id="-".join(pair)) for pair in kernels()]
each_kernel = pytest.mark.parametrize(("operation", "kernel"), KERNELS)
each_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that was asked for and not yet written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.mark.parametrize("make", [torch.empty, torch.ones(1).new_empty, lambda n: torch.empty_like(torch.ones(n))])
def test_the_poison_is_there(poisoned, make):
    assert make(3).isnan().all()


def test_every_operation_has_inputs():
    assert sorted(BUILDERS) == operations(), "kernels/examples/builders.py: BUILDERS makes inputs for every operation"


def _everything() -> Iterator[Any]:
    for (operation, kernel), n, variant in itertools.product(kernels(), LENGTHS, VARIANTS):
        short = EVERY_LAYOUT[-1] if "triangle" in operation else SHORT  # their cost grows as the cube
        quick = n in EVERY_LAYOUT or (n <= short and variant in ("plain", "masked"))
        quick = quick or (n in LONG and variant == "masked" and "triangle" not in operation)
        marks = [] if quick else [pytest.mark.slow]
        marks += [pytest.mark.quick] if n == QUICK and variant in ("plain", "masked") else []
        yield pytest.param(operation, kernel, n, variant, marks=marks, id=f"{operation}-{kernel}-{n}-{variant}")


@each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operation", "kernel", "n", "variant"), list(_everything()))
def test_numbers(operation, kernel, n, dtype, variant, device, poisoned):
    """As good as plain PyTorch, forward and backward; zeros where nothing takes part; inputs and outputs left alone."""
    case, size = case_for(operation, kernel, n, variant, dtype, device)
    truth, plain = truth_and_plain(operation, n, variant, size, dtype, device)
    got = run(case, kernel, dtype, variant=variant, device=device)
    assert_all_as_good(got, plain, truth, dtype)
    for out, gone in zip(got.outputs, case.gone_outputs, strict=True):
        if gone is not None:
            assert not out.cpu()[gone].any(), "a row in which nothing takes part is not zero"
    if variant == "masked":
        for name, gone in case.gone_values.items():
            assert not got.gradients[name].cpu()[gone].any(), f"{name} has a gradient where it takes no part"


@each_device
@each_kernel
def test_without_gradients(operation, kernel, device):
    """The forward pass under no_grad gives what it gives with gradients."""
    case, _ = case_for(operation, kernel, 17, "masked", torch.float32, device)
    without = run(case, kernel, torch.float32, backward=False, device=device)
    with_gradients = run(case, kernel, torch.float32, device=device)
    for out, same in zip(without.outputs, with_gradients.outputs, strict=True):
        torch.testing.assert_close(out, same, rtol=1e-6, atol=1e-6)


@each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_kernel
def test_what_masked_residues_hold_is_not_seen(operation, kernel, dtype, device):
    """Other numbers, much larger, where residues are masked: the same outputs and gradients."""
    case, _ = case_for(operation, kernel, 17, "masked", dtype, device)
    if not case.hidden:
        assert operation in ("triangle_attention_update", "triangle_multiplication")
        pytest.skip(f"{operation}: a masked pair is no key, but gets an update from what it holds")
    overwrite = {name: _overwrite(case, name, places) for name, places in case.hidden.items()}
    before, after = (run(case, kernel, dtype, device=device, overwrite=x) for x in (None, overwrite))
    for out, same in zip(after.outputs, before.outputs, strict=True):
        torch.testing.assert_close(out, same, rtol=1e-5, atol=1e-5)
    for name, gradient in after.gradients.items():
        # The residues' sums run over masked ones too: what they add is zero, but the order of adding may differ.
        scale = float(before.gradients[name].abs().max())
        torch.testing.assert_close(gradient, before.gradients[name], rtol=1e-5, atol=1e-5 * scale, msg=name)


def _overwrite(case: Case, name: str, places: Tensor) -> Tensor:
    value = case.values[name]
    assert value is not None
    value = value.clone()
    value[places] = 100.0 * value[places] + 37.0
    return value


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variant", ["plain", "masked"])
@pytest.mark.parametrize(("operation", "kernel"), [param for param in KERNELS if "point_attention" in param.id])
def test_points_far_from_the_origin(operation, kernel, variant, dtype, device):
    """A protein 100 nm from the origin, where squared coordinates leave float32 no digits for distances."""
    more = {"away": 100.0}
    case, size = case_for(operation, kernel, 33, variant, dtype, device, **more)
    truth, plain = truth_and_plain(operation, 33, variant, size, dtype, device, tuple(more.items()))
    assert_all_as_good(run(case, kernel, dtype, variant=variant, device=device), plain, truth, dtype)


DROPPING = [pytest.param(*pair, id="-".join(pair)) for pair in kernels() if pair[0] in DROPOUTS]


def test_every_dropout_is_tested():
    options = {name: {o for o in registry.operations()[name].options if "dropout" in o} for name in operations()}
    assert {name: found for name, found in options.items() if found} == {name: {o} for name, o in DROPOUTS.items()}


@each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["plain", "masked"])
@pytest.mark.parametrize(("operation", "kernel"), DROPPING)
def test_dropout(operation, kernel, variant, dtype, device):
    """One seed drops the same weights under every kernel, forward and backward."""
    if device == "mps":
        pytest.skip("MPS has no float64, and the truth must be drawn on the same device")
    more: dict[str, Any] = {"dropout": 0.4}
    case, size = case_for(operation, kernel, 17, variant, dtype, device, **more)
    truth, plain = truth_and_plain(operation, 17, variant, size, dtype, device, tuple(more.items()))
    got = run(case, kernel, dtype, variant=variant, device=device)
    assert_all_as_good(got, plain, truth, dtype)
    kept = run(build(operation, 17, variant, size), kernel, dtype, variant=variant, device=device)
    assert (got.outputs[0] - kept.outputs[0]).abs().max() > 0.05, "nothing was dropped"


@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("variant", ["masked", "transposed", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_kernel
def test_blocks_of_uneven_size(operation, kernel, dtype, variant, rows, monkeypatch, poisoned):
    """Several blocks of rows, the last of them smaller, give what plain PyTorch gives."""
    n = 7
    case, size = case_for(operation, kernel, n, variant, dtype, "cpu")
    truth, plain = truth_and_plain(operation, n, variant, size, dtype, "cpu")
    shrink_blocks(monkeypatch, n, rows)
    assert_all_as_good(run(case, kernel, dtype, variant=variant), plain, truth, dtype)


def shrink_blocks(monkeypatch: pytest.MonkeyPatch, n: int, rows: int) -> None:
    threads = torch.get_num_threads()
    pairs = -(-rows * n // threads)
    monkeypatch.setattr(blocking, "_PAIRS_PER_THREAD", dict.fromkeys((torch.float32, torch.float64), pairs))
    monkeypatch.setattr(blocking, "_PAIRS_PER_THREAD_16_BIT", pairs)
    for dtype in DTYPES:
        cuts = blocking.row_blocks(torch.empty(2, n, n, 1, dtype=dtype))
        cut = [(block.start, block.stop) for i, block in cuts if i == 1]
        assert cut == [(start, min(start + rows, n)) for start in range(0, n, rows)]


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
@each_kernel
def test_threads(operation, kernel, dtype, monkeypatch):
    """The number of threads decides how rows are cut, and nothing else."""
    n, threads = 15, torch.get_num_threads()
    case, size = case_for(operation, kernel, n, "masked", dtype, "cpu")
    truth, plain = truth_and_plain(operation, n, "masked", size, dtype, "cpu")
    monkeypatch.setattr(blocking, "_PAIRS_PER_THREAD", dict.fromkeys((torch.float32, torch.float64), 2 * n))
    monkeypatch.setattr(blocking, "_PAIRS_PER_THREAD_16_BIT", 2 * n)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert_all_as_good(run(case, kernel, dtype, variant="masked"), plain, truth, dtype)
    finally:
        torch.set_num_threads(threads)


# A second derivative --------------------------------------------------------------------------------------------------


def _twice(case: Case, kernel: str) -> dict[str, Tensor]:
    """The gradients of a sum of squared gradients, in float64."""
    x: dict[str, Any] = {name: None if value is None else value.clone() for name, value in case.values.items()}
    wanted = {
        name: value.requires_grad_()
        for name, value in x.items()
        if value is not None and value.is_floating_point() and name not in case.constants
    }
    torch.manual_seed(0)
    with required(case.operation, kernel) as config:
        outputs = case.call(x, config)
    r = Draws(2)
    loss = torch.stack([(out * r.normal(*out.shape)).sum() for out in outputs]).sum()
    first = torch.autograd.grad(loss, list(wanted.values()), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), list(wanted.values()), allow_unused=True)
    return {name: g for name, g in zip(wanted, second, strict=True) if g is not None}


def _options(operation: str) -> list[dict[str, Any]]:
    return [{}, {"dropout": 0.3}] if operation in DROPOUTS else [{}]


TWICE = [
    pytest.param(operation, kernel, more, id="-".join([operation, kernel, *more]))
    for operation, kernel in kernels()
    for more in _options(operation)
]


@pytest.mark.parametrize(("operation", "kernel", "more"), TWICE)
def test_second_derivative(operation, kernel, more):
    """Right where there is one; else an error that names the kernel that has it."""
    case = build(operation, 7, "masked", 0, **more)
    skip_unless_it_runs(case, kernel, torch.float64, "cpu")
    if kernel == "reference":
        assert _twice(case, kernel)
        return
    try:
        got = _twice(case, kernel)
    except NoDoubleBackward as refusal:
        assert operation in str(refusal) and "'reference'" in str(refusal)
        return
    for name, true in _twice(case, "reference").items():
        torch.testing.assert_close(got[name], true, rtol=1e-9, atol=1e-9 * float(true.abs().max()))


@pytest.mark.parametrize("operation", sorted(BUILDERS))
def test_second_derivative_of_the_reference(operation):
    """Against finite differences of the first."""
    case = build(operation, 3, "masked")
    names = [n for n, v in case.values.items() if v is not None and v.is_floating_point() and n not in case.constants]
    first = ["q", "k_points", "z", "bias_weight", "nodes", "weight_1"]
    names = [name for name in first if name in names]

    def function(*some: Tensor) -> tuple[Tensor, ...]:
        with required(operation, "reference") as config:
            return case.call({**case.values, **dict(zip(names, some, strict=True))}, config)

    inputs = tuple(value.clone().requires_grad_() for name in names if (value := case.values[name]) is not None)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True, atol=1e-4, check_undefined_grad=False)


def test_the_rule_sees_what_it_is_there_for():
    """Errors planted in a copy of plain PyTorch's result: each is seen."""
    for operation, dtype in itertools.product(sorted(BUILDERS), DTYPES):
        truth, plain = truth_and_plain(operation, 17, "masked", 0, dtype, "cpu")
        # Of a gradient behind a ReLU, bfloat16 moves single entries by a fifth of the largest.
        for spoil in (_scaled_by_a_third if dtype is torch.bfloat16 else _scaled, _one_missing, _a_nan):
            for which in range(len(plain.outputs)):
                outputs = tuple(spoil(out) if i == which else out for i, out in enumerate(plain.outputs))
                with pytest.raises(AssertionError, match="output"):
                    assert_all_as_good(type(plain)(outputs, plain.gradients, []), plain, truth, dtype)
            largest = max(float(gradient.abs().max()) for gradient in truth.gradients.values())
            for name in plain.gradients:
                if float(truth.gradients[name].abs().max()) < 1e-9 * largest:
                    continue  # what a softmax removes has no gradient to spoil
                spoilt = {**plain.gradients, name: spoil(plain.gradients[name])}
                with pytest.raises(AssertionError, match=f"gradient of {name}"):
                    assert_all_as_good(type(plain)(plain.outputs, spoilt, []), plain, truth, dtype)


def _scaled(x: Tensor) -> Tensor:
    return x * 1.03


def _scaled_by_a_third(x: Tensor) -> Tensor:
    return x * (4 / 3)


def _one_missing(x: Tensor) -> Tensor:
    x = x.contiguous().clone()
    x.view(-1)[x.abs().argmax()] = 0.0
    return x


def _a_nan(x: Tensor) -> Tensor:
    x = x.contiguous().clone()
    x.view(-1)[0] = torch.nan
    return x
