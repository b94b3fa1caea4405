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
