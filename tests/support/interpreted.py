"""What the scripts share that run Triton's kernels in its interpreter; `triton_tools.interpreter` starts them.

The interpreter is chosen when Triton is imported, so that it needs a process of its own.
"""

import dataclasses
import json
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from foldkernels.kernels import registry
from foldkernels.kernels.common.double_backward import NoDoubleBackward
from foldkernels.kernels.testing import accuracy

#: What an error may be beyond twice plain PyTorch's, as a part of the largest value.
FLOOR = {**accuracy.FLOOR, torch.float16: 2e-3}


def allow_the_cpu(operations: Iterable[str]) -> None:
    """The interpreter's kernels run where `supports` says that they do not."""
    for operation in operations:
        if (ours := registry.kernels(operation).get("triton")) is not None:
            registry.register(dataclasses.replace(ours, supports=lambda request: []))


def poison_memory() -> None:
    """Memory that is asked for and not yet written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory


def second_derivative(out: Tensor, leaf: Tensor) -> str:
    """What asking for one says."""
    (once,) = torch.autograd.grad(out, [leaf], create_graph=True)
    try:
        once.sum().backward()
    except NoDoubleBackward as error:
        return str(error)
    return "nothing raised"


def answer_questions(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer one JSON object a line with another, until the questions end; what is raised is answered as `raised`."""
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            found = answer(json.loads(line))
        except Exception:
            found = {"raised": traceback.format_exc()}
        print(json.dumps(found), file=answers, flush=True)
