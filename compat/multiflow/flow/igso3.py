"""Random rotations from the isotropic Gaussian on SO(3), drawn on the CPU as Multiflow draws them.

Source: Leach et al., "Denoising diffusion probabilistic models on SO(3) for rotational alignment", 2022; Yim et al.,
"SE(3) diffusion model with application to protein backbone generation", 2023 (arXiv 2302.02277), equation 5.
"""

from __future__ import annotations

import math
from functools import cache

import roma
import torch
from jaxtyping import Float
from torch import Generator, Tensor

NOISE_SCALE = 1.5
"""Standard deviation of the rotations that training starts from; nearly uniform."""

_NUM_ANGLES = 1000


@cache
def angle_table(sigma: float = NOISE_SCALE) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Angles (radians, from nearly 0 to pi) and their cumulative probability, by the trapezoid rule on that grid.

    The grid is denser at small angles. Summed in float64, given in float32, in which the original keeps its table.

    Args:
        sigma: Standard deviation; Brownian motion on SO(3) at time sigma squared. Below 0.1 the series needs more
            terms than are summed here.

    Raises:
        ValueError: Such a sigma.
    """
    if sigma < 0.1:
        raise ValueError(f"sigma is {sigma}: the series is summed for at least 0.1")
    angles = torch.linspace(0.0, 1.0, _NUM_ANGLES + 1).double() ** 3 * math.pi
    # The term of order 100 is smaller than 1e-20 of the first, at 0.1 too.
    orders = torch.arange(101, dtype=torch.float64)
    weights = (2 * orders + 1) * torch.exp(-orders * (orders + 1) * sigma**2 / 2)
    series = (weights * torch.sin((orders + 0.5) * angles[:, None])).sum(-1) / (torch.sin(angles / 2) + 1e-7)
    density = series * (1 - torch.cos(angles)) / math.pi  # zero at the angle zero
    cumulative = torch.cumsum((density[1:] + density[:-1]) / 2 * angles.diff(), dim=0)
    return angles[1:].float(), (cumulative / cumulative[-1]).float()


def rotation_noise(
    count: int, sigma: float = NOISE_SCALE, generator: Generator | None = None
) -> Float[Tensor, "count 3 3"]:
    """Rotation matrices about uniform axes, by angles that the inverse of the cumulative probability gives.

    Args:
        count: How many.
        sigma: See `angle_table`.
        generator: On the CPU; torch's global one by default. Draws `randn(1, count, 3)`, then `rand(1, count)`.

    Returns:
        float32, on the CPU.
    """
    axes = torch.randn(1, count, 3, generator=generator)[0]
    axes = axes / torch.linalg.vector_norm(axes, dim=-1, keepdim=True)
    probability = torch.rand(1, count, generator=generator)[0]
    angles, cumulative = angle_table(sigma)
    above = torch.searchsorted(cumulative, probability)
    below = (above - 1).clamp(min=0)
    step = (cumulative[above] - cumulative[below]).clamp(min=1e-7)
    part = ((probability - cumulative[below]) / step).clamp(0.0, 1.0)
    angle = torch.lerp(angles[below], angles[above], part)
    return roma.rotvec_to_rotmat(axes * angle[:, None])
