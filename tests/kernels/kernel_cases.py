"""Inputs for every operation, in every layout and mask, and what a kernel may leave out.

Inputs and the rule are the package's own (`kernels/examples`, `kernels/accuracy.py`). A new kernel needs nothing here.
"""

from typing import Any

import pytest
import torch

from foldkernels.kernels import registry
from foldkernels.kernels.testing import accuracy
from foldkernels.kernels.testing.accuracy import Ran
from foldkernels.kernels.testing.cases.case import Case
from foldkernels.kernels.testing.contract_grid import build

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
DEVICES = (
    "cpu",
    *(["cuda"] if torch.cuda.is_available() else []),
    *(["mps"] if torch.backends.mps.is_available() else []),
)

#: Kernels of plain PyTorch must run everywhere, except for what is named here.
MUST_RUN = ("reference", "torch")
MAY_REFUSE = {("invariant_point_attention", "torch"): {"logit_dropout"}}


def operations() -> list[str]:
    return sorted(set(registry.operations()))


def kernels() -> list[tuple[str, str]]:
    """Every operation's every kernel, as the registry knows them."""
    return [(operation, kernel) for operation in operations() for kernel in sorted(registry.kernels(operation))]


def skip_unless_it_runs(case: Case, kernel: str, dtype: torch.dtype, device: str, grad: bool = True) -> None:
    """Skip with every reason why a kernel cannot serve a case; those of plain PyTorch have no excuse."""
    why = why_not(case, kernel, dtype, device, grad)
    if not why:
        return
    excused = case.options & MAY_REFUSE.get((case.operation, kernel), set())
    assert kernel not in MUST_RUN or excused, f"{case.operation}: {kernel} must run: {why}"
    pytest.skip(f"{case.operation}: {kernel} cannot run on {device}: {why}")


def why_not(case: Case, kernel: str, dtype: torch.dtype, device: str, grad: bool = True) -> str:
    """Every reason against a kernel, empty if it can run."""
    return "; ".join(str(reason) for reason in accuracy.reasons(case, kernel, dtype, device, grad))


def case_for(
    operation: str, kernel: str, n: int, variant: str, dtype: torch.dtype, device: str, **more: Any
) -> tuple[Case, int]:
    """The smallest sizes that the kernel serves; skips if it serves none."""
    for size in (0, 1):
        case = build(operation, n, variant, size, **more)
        if not why_not(case, kernel, dtype, device):
            return case, size
    skip_unless_it_runs(build(operation, n, variant, 0, **more), kernel, dtype, device)
    raise AssertionError("unreachable: skipped above")


def assert_all_as_good(got: Ran, plain: Ran, truth: Ran, dtype: torch.dtype) -> None:
    """Every output and every gradient."""
    for verdict in accuracy.judge(got, plain, truth, dtype):
        assert verdict.passed, str(verdict)
