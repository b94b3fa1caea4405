"""Calls that nobody thought of: hypothesis draws them, and every kernel must hold the rule on all of them.

`make test` draws the same few hundred each time; with --slow there are four thousand more, which are new each time
(hypothesis prints what draws a failing one again).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings

from foldkernels.kernels import registry
from foldkernels.kernels.testing import accuracy
from foldkernels.kernels.testing.cases.builders import BUILDERS

from ..support import drawn
from ..support.standins import restored

OPERATIONS = tuple(sorted(BUILDERS))
KERNELS = ("torch", "reference")
ANY = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
FEW = settings(ANY, max_examples=40, derandomize=True, phases=[Phase.explicit, Phase.generate, Phase.shrink])
MANY = settings(ANY, max_examples=400, print_blob=True)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that was asked for and not yet written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


def holds(call: drawn.Call) -> None:
    """The rule: at most twice plain PyTorch's error, and the floor; outputs, and every gradient that is asked for."""
    assume(not accuracy.reasons(call.case(), call.kernel, call.computed_in, "cpu"))
    drawn.assert_holds(call)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_drawn_calls(operation: str) -> None:
    @FEW
    @given(drawn.calls((operation,), KERNELS, 24))
    def test(call: drawn.Call) -> None:
        holds(call)

    test()


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_many_drawn_calls(operation: str) -> None:
    @MANY
    @given(drawn.calls((operation,), KERNELS, 70))
    def test(call: drawn.Call) -> None:
        holds(call)

    test()


WRONG = {
    "a tenth too much": lambda x: x * 1.1,
    "a row missing": lambda x: x.index_fill(0, torch.tensor([0]), 0.0),
    "not a number": lambda x: torch.full_like(x, torch.nan),
    "another type": lambda x: x.to(torch.float16),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("operation", ["attention", "triangle_attention"])
def test_a_wrong_kernel_is_found(operation: str, wrong: str) -> None:
    """Within the draws of `make test`."""
    with restored():
        right = registry.kernels(operation)["reference"].load()
        WRONG_NOW[:] = [lambda *arguments: WRONG[wrong](right(*arguments))]
        registry.register(replace(registry.kernels(operation)["torch"], load=load_wrong))

        @settings(FEW, phases=[Phase.generate])
        @given(drawn.calls((operation,), ("torch",), 24))
        def test(call: drawn.Call) -> None:
            holds(call)

        with pytest.raises(AssertionError):
            test()


WRONG_NOW: list[Callable[..., torch.Tensor]] = []


def load_wrong() -> Callable[..., torch.Tensor]:
    return WRONG_NOW[0]
