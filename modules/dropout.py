"""Dropout of whole rows or columns of the pair representation."""

import torch
from jaxtyping import Float
from torch import Tensor


def pair_dropout(
    rate: float, z: Float[Tensor, "b n m c"], columnwise: bool = False
) -> Float[Tensor, "b n 1 1"] | Float[Tensor, "b 1 m 1"] | None:
    """Draw the factor by which an update is multiplied, one for each row of z (or column); None for a rate of zero.

    Jumper et al. 2021, Supplementary section 1.11.6; drawn as Boltz draws it, so that one seed gives one training step.
    Nothing is drawn at a rate of zero, where Boltz draws and drops nothing.

    Args:
        rate: Probability of dropping a row.
        z: What the update is added to.
        columnwise: Draw for columns instead.
    """
    if rate == 0.0:
        return None
    b, n, m = z.shape[:3]
    shape = (b, 1, m, 1) if columnwise else (b, n, 1, 1)
    keep = torch.rand(shape, dtype=torch.float32, device=z.device) >= rate
    return keep.to(z.dtype) / (1.0 - rate)


def check_rate(layer: str, name: str, rate: float) -> float:
    """The rate itself.

    Raises:
        ValueError: It is no probability below 1.
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"{layer}: {name} is a probability of at least 0 and below 1, not {rate}")
    return float(rate)
