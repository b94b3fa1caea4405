"""Sinusoids of positions and times, as the checkpoints were trained with them: always computed in float32."""

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def sinusoids(
    positions: Shaped[Tensor, "..."], size: int, max_length: int, dtype: torch.dtype
) -> Float[Tensor, "... size"]:
    """Sines, then cosines, of a position at `size` / 2 wavelengths (after Vaswani et al. 2017, section 3.5).

    Args:
        positions: Positions or offsets, integers or floats.
        size: Channels; half of them sines.
        max_length: The longest wavelength, in positions.
        dtype: The result's type. The angles are float32 whatever it is: so it was trained, and MPS has no float64.
    """
    k = torch.arange(size // 2, device=positions.device)
    wavelength = max_length ** (2 * k.to(torch.float32) / size)
    angle = positions[..., None].to(torch.float32) * math.pi / wavelength
    return torch.cat([angle.sin(), angle.cos()], dim=-1).to(dtype)


def time_sinusoids(times: Float[Tensor, " b"], size: int, dtype: torch.dtype) -> Float[Tensor, "b size"]:
    """Sines, then cosines, of times in [0, 1], as in Ho et al. 2020 (denoising diffusion).

    Args:
        times: Times in [0, 1].
        size: Channels, an even number.
        dtype: The result's type; the angles are float32.
    """
    half = size // 2
    rates = torch.arange(half, dtype=torch.float32, device=times.device) * (-math.log(2056) / (half - 1))
    angle = (times.to(torch.float32) * 2056)[:, None] * rates.exp()
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(dtype)
