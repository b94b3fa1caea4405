"""Small questions about tensors that several operations ask."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, List, TypeVar  # noqa: UP035

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])
#: A list of tensors in the signature of a custom operator: the one spelling that PyTorch 2.6's `custom_op` can read.
TensorList = List[Tensor]  # noqa: UP006
#: Whether autocast is on for any device: one call, where asking for a tensor's own device costs several. A PyTorch
#: without it is asked for the device.
_autocast_somewhere: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def constant(function: _Function) -> _Function:
    """Have Dynamo run `function` while it traces, and keep the answer in the graph.

    `torch.compiler.assume_constant_result` does the same, which is to set one attribute; but it loads all of Dynamo
    for that, which takes longer than loading the rest of PyTorch. A test holds the two to each other.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def any_requires_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward pass through any of `tensors` may follow."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # a generator would cost more than the rest of a look-up
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def require_one_device(like: Tensor, *others: Tensor | None) -> None:
    """Raise PyTorch's own error where tensors are on several devices.

    A custom operator with one of them on meta (weights that were never loaded, or are offloaded) would run as on meta,
    and give back memory that nobody wrote.

    Raises:
        RuntimeError: They are.
    """
    device = like.device
    for other in others:
        if other is not None and other.device != device:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{device} and {other.device}!"
            )


def floating_type(like: Tensor) -> torch.dtype:
    """The type that `like` is computed in: its own, or what autocast makes of it."""
    dtype = like.dtype
    if not _autocast_somewhere():  # as `under_autocast` asks first, here without the call
        return dtype
    return torch.get_autocast_dtype(like.device.type) if dtype is not torch.float64 and under_autocast(like) else dtype


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in a type. Most calls change nothing, and `Tensor.to` takes a microsecond to find that out."""
    return x if x.dtype is dtype else x.to(dtype)


def in_use(**options: object) -> tuple[str, ...]:
    """The names of a call's optional features that are there: neither None nor False."""
    return tuple([name for name, given in options.items() if given is not None and given is not False])


def widest(*tensors: Tensor) -> torch.dtype:
    """The floating type that holds all of `tensors`, and at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def under_autocast(like: Tensor) -> bool:
    """Whether autocast is on for the device of `like`. A device without autocast (meta) must not be asked."""
    if not _autocast_somewhere():
        return False
    device = like.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Compute what stands inside in the types that it is given. Where autocast is off already, this costs nothing."""
    return torch.autocast(like.device.type, enabled=False) if under_autocast(like) else nullcontext()


def item_masks(mask: Tensor | None, items: int) -> list[Tensor | None]:
    """The mask of each batch item; None where all of it takes part. A GPU's mask is not looked at: that would wait."""
    if mask is None:
        return [None] * items
    return [None if mask.device.type == "cpu" and bool(item.all()) else item for item in mask]
