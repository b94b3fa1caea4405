"""Triton kernels under `torch.compile(fullgraph=True)` and bfloat16 autocast, interpreted.

IPA's is in its own file.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from ...support.triton_tools import Ask, interpreter, with_triton

NARROW, WIDE = "torch.bfloat16", "torch.float32"
#: The types of each operation's outputs under autocast; points stay wide.
OUTPUTS = {
    "edge_transition": [NARROW],
    "factorized_point_attention": [NARROW, WIDE, NARROW],
    "triangle_attention": [NARROW],
    "attention_pair_bias": [NARROW],
}
#: A program a head and row: the interpreter, which runs one after another, takes minutes over ten rows of three heads.
FEW: dict[str, Any] = {"lengths": [3, 6, 4], "sizes": {"h": 1, "d": 5, "cz": 13}}
CASES = {"triangle_attention": FEW, "attention_pair_bias": FEW}
PLAIN: dict[str, Any] = {"operation": "", "autocast": False, "lengths": [9, 19, 11], "sizes": None}


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    with interpreter("compile_interpreter", PLAIN) as answer:
        yield answer


def _cases() -> Iterator[Any]:
    for operation in OUTPUTS:
        for autocast in (False, True):
            quick = (operation, autocast) == ("edge_transition", True)
            marks = [] if quick else [pytest.mark.slow]
            yield pytest.param(operation, autocast, id=f"{operation}{'-autocast' * autocast}", marks=marks)


@with_triton
@pytest.mark.parametrize(("operation", "autocast"), [*_cases()])
def test_whole_graphs(ask, operation, autocast):
    """Two graphs at most for three lengths, gradients among them; the eager call's numbers and types.

    float32 inputs: under autocast each operation rounds them itself, once, and its outputs say so.
    """
    found = ask(operation=operation, autocast=autocast, **CASES.get(operation, {}))
    assert found["graphs"] <= 2
    assert found["types"] == (OUTPUTS[operation] if autocast else [WIDE] * len(OUTPUTS[operation]))
    assert found["ran"] == [f"{operation}: triton"]
    assert found["most"] < (1e-5 if not autocast else 1e-2)
