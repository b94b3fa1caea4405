"""Masks of checkpoints are floats; kernels take booleans."""

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor


def boolean(mask: Shaped[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """True where a mask says "take part": above 0.5. Fractional masks are not supported, and are rounded like this."""
    return mask if mask.dtype is torch.bool else mask > 0.5
