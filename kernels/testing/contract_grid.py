"""The contract's grid: every operation at many lengths, in every layout, and what its kernels are compared with."""

from functools import lru_cache
from typing import Any

import torch

from . import accuracy
from .cases.builders import varied
from .cases.case import Case


@lru_cache(maxsize=256)
def build(operation: str, n: int, variant: str = "plain", size: int = 0, **more: Any) -> Case:
    """`plain` is one item without masks; every other variant is three items, each masked in its own way."""
    batch = 1 if variant == "plain" else 3
    return varied(operation, n, batch, variant != "plain", size, seed=n, **more)


@lru_cache(maxsize=64)
def truth_and_plain(
    operation: str,
    n: int,
    variant: str,
    size: int,
    dtype: torch.dtype,
    device: str,
    more: tuple[tuple[str, Any], ...] = (),
) -> tuple[accuracy.Ran, accuracy.Ran]:
    """The definition in float64, and what plain PyTorch makes of the same inputs: kept, for the next kernel."""
    return accuracy.truth_and_plain(build(operation, n, variant, size, **dict(more)), dtype, variant, device)
