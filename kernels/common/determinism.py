"""Reasons against kernels whose backward pass adds up in no fixed order on an NVIDIA GPU."""

from __future__ import annotations

from ..registry.types import Reason, Request


def reasons_against_unordered_sums(request: Request, operator: str) -> list[Reason]:
    """Say why a kernel cannot serve `deterministic: true`, where one of PyTorch's operators in it uses float atomics.

    Args:
        request: What is asked for.
        operator: The operator, as messages name it.
    """
    if not (request.deterministic and request.grad and request.device == "cuda"):
        return []
    return [Reason(f"on CUDA {operator} adds up in another order in each run", "use kernel 'reference'")]
