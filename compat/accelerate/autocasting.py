"""Under autocast, the type of an output is the last layer's choice: a replaced forward returns the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...kernels.dtypes import floating_type


def layer_norm_type(norm: nn.LayerNorm, like: Tensor) -> torch.dtype:
    """The floating type in which a module that ends in `norm` returns what it computes from `like`.

    A GPU's autocast runs LayerNorm in float32, a CPU's does not; so it is asked, with an empty tensor.
    """
    dtype = floating_type(like)
    if dtype is like.dtype:
        return dtype
    empty: Tensor = norm(like.new_empty((0, *norm.normalized_shape), dtype=dtype))
    return empty.dtype
