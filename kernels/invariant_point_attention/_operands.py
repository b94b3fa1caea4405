"""How numbers are laid out for invariant point attention's Triton kernels."""

import torch
from torch import Tensor

LOG2E = 1.4426950408889634


def up(size: int, to: int = 16) -> int:
    """The next multiple of `to`; Triton reads in vectors where a size is a multiple of 16."""
    return -(-size // to) * to


def power(x: Tensor, axis: int) -> Tensor:
    """The power of two next above the largest magnitude along an axis, which stays; 1 where all are zero."""
    largest = x.abs().amax(axis, keepdim=True)
    return torch.where(largest > 0, torch.exp2(torch.ceil(torch.log2(largest.clamp(min=1e-30)))), 1.0)
