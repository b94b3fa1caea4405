"""Compiles calls of Triton kernels as whole graphs, in Triton's interpreter on a CPU. Started as a script.

Reads one JSON object a line: an operation, its lengths, its sizes (null: the small ones), whether under autocast.
Answers with one a line: the largest difference from the eager call, of outputs and gradients, as a part of the largest
value; how many graphs; the outputs' types; or `raised`.
"""

from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from foldkernels.kernels import registry
from foldkernels.kernels.testing.accuracy import required
from foldkernels.kernels.testing.cases.builders import SMALL, make
from foldkernels.kernels.testing.cases.case import Case

from .interpreted import allow_the_cpu, answer_questions


def leaves(case: Case) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Fresh float32 inputs, and those that gradients are asked for."""
    x = {
        name: value.float().clone().requires_grad_(name not in case.constants)
        if value is not None and value.is_floating_point()
        else value
        for name, value in case.values.items()
    }
    return x, [value for value in x.values() if value is not None and value.requires_grad]


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    operation, lengths = asked["operation"], asked["lengths"]
    sizes = SMALL if asked["sizes"] is None else asked["sizes"]
    allow_the_cpu([operation])
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    most, types = 0.0, []
    with (
        required(operation, "triton") as config,
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=asked["autocast"]),
        registry.record_kernels() as ran,
    ):
        call = make(operation, lengths[0], sizes=sizes, masked=True).call
        compiled = torch.compile(lambda x: call(x, config), fullgraph=True, backend=counter)
        for n in lengths:
            case = make(operation, n, sizes=sizes, masked=True)
            results = []
            for run in (lambda x: call(x, config), compiled):
                x, wanted = leaves(case)
                outputs = run(x)
                asked_of = sum(out.float().square().sum() for out in outputs)
                results.append([*outputs, *torch.autograd.grad(asked_of, wanted)])
                types = [str(out.dtype) for out in outputs]
            for eager, graph in zip(*results, strict=True):
                scale = max(float(eager.detach().abs().max()), 1e-30)
                most = max(most, float((eager - graph).detach().abs().max()) / scale)
    return {"most": most, "graphs": counter.frame_count, "types": types, "ran": sorted(set(ran))}


if __name__ == "__main__":
    answer_questions(answer)
