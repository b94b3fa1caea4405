"""TF32: PyTorch's switch for float32 products on NVIDIA GPUs, read and set through either of its interfaces.

PyTorch 2.9 brought `torch.backends.cuda.matmul.fp32_precision` ("ieee", "tf32", or "none" to inherit from
`torch.backends.fp32_precision`). Once a program has used it, reading the older `allow_tf32` or
`torch.get_float32_matmul_precision()` raises. Older versions have only those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..dtypes import constant

#: Devices whose float32 products have TF32.
DEVICES = frozenset({"cuda"})
_matmul: Any = torch.backends.cuda.matmul
_backends: Any = torch.backends
_NOTHING = nullcontext()


def _is_new() -> bool:
    try:
        return isinstance(_matmul.fp32_precision, str)
    except AttributeError:  # PyTorch before 2.9
        return False


NEW_INTERFACE = _is_new()


@constant
def allowed() -> bool:
    """Whether PyTorch may round float32 products on CUDA to TF32, as a program has set it by either interface."""
    return bool(_matmul.fp32_precision == "tf32" if NEW_INTERFACE else _matmul.allow_tf32)


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Allow or forbid TF32 inside; afterwards all is as it was found, inherited settings included.

    Args:
        on: Whether float32 products on CUDA may round to TF32.
    """
    if not NEW_INTERFACE:
        before = torch.get_float32_matmul_precision()
        _matmul.allow_tf32 = on
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    found = _own_setting()
    _matmul.fp32_precision = "tf32" if on else "ieee"
    try:
        yield
    finally:
        _matmul.fp32_precision = found


def _own_setting() -> str:
    """The new interface's setting of CUDA products itself: "none" where what it reads is inherited.

    PyTorch gives the value that holds, so another value is put where it may come from, for a moment.
    """
    held, general = str(_matmul.fp32_precision), str(_backends.fp32_precision)
    if held == "none" or held != general:
        return held
    _backends.fp32_precision = "ieee" if general == "tf32" else "tf32"
    try:
        return held if _matmul.fp32_precision == held else "none"
    finally:
        _backends.fp32_precision = general


def allowance(like: Tensor, precision: str) -> AbstractContextManager[object]:
    """Allow TF32 inside an operator, where the configuration's `precision: tf32` does and the device has it.

    Elsewhere nothing is changed, and it costs nothing. A compiled graph does not hold the switch: there PyTorch's own
    setting decides.

    Args:
        like: A tensor of the call.
        precision: What the configuration lets a kernel round to.
    """
    if precision != "tf32" or like.device.type not in DEVICES or torch.compiler.is_compiling() or allowed():
        return _NOTHING
    return switched(True)


def remembering(keep: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """Wrap a custom operator's `setup_context`, so that its backward pass knows whether TF32 was allowed."""

    @wraps(keep)
    def wrapped(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.foldkernels_tf32 = allowed()
        keep(ctx, inputs, output)

    return wrapped


def as_remembered(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a custom operator's backward pass: TF32 is allowed in it where it was in the forward pass."""

    @wraps(backward)
    def wrapped(ctx: Any, *gradients: Any) -> Any:
        if not ctx.foldkernels_tf32 or allowed():
            return backward(ctx, *gradients)
        with switched(True):
            return backward(ctx, *gradients)

    return wrapped
