"""Small questions about tensors that several operations ask."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def any_requires_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward pass through any of `tensors` may follow."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # a generator would cost more than the rest of a look-up
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def widest(*tensors: Tensor) -> torch.dtype:
    """The floating type that holds all of `tensors`, and at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def under_autocast(like: Tensor) -> bool:
    """Whether autocast is on for the device of `like`. A device without autocast (meta) must not be asked."""
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
