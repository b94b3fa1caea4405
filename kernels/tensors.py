"""Small questions about tensors that several operations ask."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def any_requires_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward pass through any of `tensors` may follow."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def widest(*tensors: Tensor) -> torch.dtype:
    """The floating type that holds all of `tensors`, and at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Compute what stands inside in the types that it is given. A device that has no autocast (meta) does so anyway."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def item_masks(mask: Tensor | None, items: int) -> list[Tensor | None]:
    """The mask of each batch item; None where all of it takes part. A GPU's mask is not looked at: that would wait."""
    if mask is None:
        return [None] * items
    return [None if mask.device.type == "cpu" and bool(item.all()) else item for item in mask]
