"""Second derivatives: what custom operators of ours, and PyTorch's fused kernels, say when they are asked for one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import NoDoubleBackward


def no_double_backward(backward: Any, *, operation: str, kernel: str, setting: str = "") -> None:
    """Make a backward operator say who can differentiate twice, when it is itself differentiated.

    Args:
        backward: The operator.
        operation: What it is the backward of.
        kernel: Whose.
        setting: The operation that a configuration names instead, where this one is fused from it.
    """

    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise _refusal(operation, kernel, setting)

    backward.register_autograd(refuse)


def fused_by_pytorch(out: Tensor, *, operation: str, kernel: str) -> Tensor:
    """Make what scaled_dot_product_attention gave say the same, where PyTorch has taken a kernel without a second one.

    Its own words name no way out. Where it has taken none of its fused kernels, both derivatives are there, and stay.
    Nothing is done while compiling: what is compiled has no second derivative in PyTorch, either.

    Args:
        out: The result, on which nothing has been done yet.
        operation: What it is the result of.
        kernel: Whose.
    """
    if torch.compiler.is_compiling() or not out.requires_grad:
        return out

    def refuse_later(asked: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> Sequence[Tensor | None] | None:
        if not torch.is_grad_enabled():  # nobody will differentiate them
            return None
        return tuple(x if x is None else _Once.apply(x, operation, kernel) for x in asked)

    node = out.grad_fn
    while node is not None and type(node).__name__ in _RESHAPING:
        node = node.next_functions[0][0]
    if node is not None and type(node).__name__.startswith("ScaledDotProduct"):
        node.register_hook(refuse_later)
    return out


#: What scaled_dot_product_attention does to a fused kernel's result: it cuts off columns that it had added.
_RESHAPING = frozenset({"SliceBackward0"})


class _Once(torch.autograd.Function):
    """A gradient as it is, which is not differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, operation: str, kernel: str) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.operation, ctx.kernel = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise _refusal(ctx.operation, ctx.kernel)


def _refusal(operation: str, kernel: str, setting: str = "") -> NoDoubleBackward:
    return NoDoubleBackward(
        f"{operation}: the kernel {kernel!r} has no second derivative; "
        f"use the kernel 'reference' (kernel: {{{setting or operation}: reference}})"
    )
