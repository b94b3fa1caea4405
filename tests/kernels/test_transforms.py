"""Forward mode, torch.func and vmap through every operation: right, or an error that names the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from foldkernels.errors import TransformUnsupported
from foldkernels.kernels.testing.accuracy import required
from foldkernels.kernels.testing.contract_grid import build

from .kernel_cases import kernels, why_not

pytestmark = pytest.mark.quick

KERNELS = [pytest.param(*pair, id="-".join(pair)) for pair in kernels()]


def problem(operation: str) -> tuple[Any, list[str], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A small case in float64: itself, the names of its differentiable inputs, their values, and tangents."""
    case = build(operation, 5, "masked", 0)
    floats = {k: v.double() for k, v in case.values.items() if v is not None and v.is_floating_point()}
    names = [name for name in floats if name not in case.constants]
    generator = torch.Generator().manual_seed(3)
    tangents = tuple(torch.randn(floats[n].shape, generator=generator, dtype=torch.float64) for n in names)
    return case, names, tuple(floats[n].detach().clone() for n in names), tangents


def called(case: Any, names: list[str], config: str) -> Callable[..., tuple[Tensor, ...]]:
    fixed = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in case.values.items()}
    return lambda *values: case.call({**fixed, **dict(zip(names, values, strict=True))}, config)


def tangents_of(function: Callable[..., Any], values: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> list[Tensor]:
    """By dual numbers, without torch.func."""
    with forward_ad.dual_level():
        out = function(*(forward_ad.make_dual(v, t) for v, t in zip(values, tangents, strict=True)))
        return [tangent for each in out if (tangent := forward_ad.unpack_dual(each).tangent) is not None]


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "jvp": lambda f, v, t: torch.func.jvp(f, v, t)[1],
    "dual numbers": tangents_of,
    "grad": lambda f, v, t: torch.func.grad(lambda x: sum((o * o).sum() for o in f(x, *v[1:])))(v[0]),
    "jacrev": lambda f, v, t: torch.func.jacrev(lambda x: f(x, *v[1:])[0].sum())(v[0]),
    "vmap": lambda f, v, t: torch.func.vmap(lambda x: f(x, *v[1:]))(torch.stack([v[0], v[0] + 0.1 * t[0]])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("operation", "kernel"), KERNELS)
def test_right_or_refused(operation, kernel, transform):
    """Never zeros, and never a raw error."""
    case, names, values, tangents = problem(operation)
    if why := why_not(case, kernel, torch.float64, "cpu"):
        pytest.skip(f"{operation}: {kernel} cannot run here: {why}")
    apply = TRANSFORMS[transform]
    with required(operation, "reference") as config:
        expected = apply(called(case, names, config), values, tangents)
    with required(operation, kernel) as config:
        try:
            results = apply(called(case, names, config), values, tangents)
        except TransformUnsupported as refusal:
            assert kernel != "reference" and "'reference'" in str(refusal) and operation in str(refusal)
            return
    for result, right in zip(flat(results), flat(expected), strict=True):
        torch.testing.assert_close(result, right, rtol=1e-8, atol=1e-8)
    assert any(right.abs().max() > 0 for right in flat(expected)) or transform == "jacrev"


def flat(values: Any) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else list(values)


def test_the_definition_agrees_with_finite_differences():
    """The tangents that all others are held to."""
    case, names, values, tangents = problem("triangle_multiplication")
    with required("triangle_multiplication", "reference") as config:
        function = called(case, names, config)
        (tangent,) = flat(torch.func.jvp(function, values, tangents)[1])
        step = 1e-6
        moved = [tuple(v + s * step * t for v, t in zip(values, tangents, strict=True)) for s in (1, -1)]
        (plus,), (minus,) = function(*moved[0]), function(*moved[1])
    torch.testing.assert_close(tangent, (plus - minus) / (2 * step), rtol=1e-6, atol=1e-6)


def test_what_is_no_transform_is_not_refused():
    """A dual level that has been left, and tensors that only look like a transform's."""
    case, names, values, _ = problem("edge_transition")
    with forward_ad.dual_level():
        pass
    results = []
    for kernel in ("reference", "torch"):
        with required("edge_transition", kernel) as config:
            results.append(called(case, names, config)(*values))
    for result, right in zip(*results, strict=True):
        torch.testing.assert_close(result, right)
