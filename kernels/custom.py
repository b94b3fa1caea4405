"""What every custom operator of ours needs."""

from typing import Any

import torch


class NoDoubleBackward(NotImplementedError):
    """A second derivative was asked of a kernel that has only the first."""


def no_double_backward(backward: Any, *, operation: str, kernel: str, setting: str = "") -> None:
    """Make a backward operator say who can differentiate twice, when it is itself differentiated.

    Args:
        backward: The operator.
        operation: What it is the backward of.
        kernel: Whose.
        setting: The operation that a configuration names instead, where this one is fused from it.
    """

    def refuse(ctx: Any, *gradients: torch.Tensor) -> None:
        raise NoDoubleBackward(
            f"{operation}: the kernel {kernel!r} has no second derivative; "
            f"use the kernel 'reference' (kernel: {{{setting or operation}: reference}})"
        )

    backward.register_autograd(refuse)
