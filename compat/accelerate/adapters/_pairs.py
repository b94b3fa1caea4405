"""What the adapters of pair layers share: any batch axes in front, masks that broadcast, inputs for the proof."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from ....modules.masks import boolean
from ..recognition import Example


def squares(
    z: Float[Tensor, "*b n n c"], mask: Shaped[Tensor, "*#b n n"] | None
) -> tuple[Float[Tensor, "bs n n c"], Bool[Tensor, "bs n n"] | None]:
    """The pair tensor and its mask with one batch axis."""
    n, m = z.shape[-3:-1]
    if mask is not None:
        mask = boolean(mask).expand(z.shape[:-1]).reshape(-1, n, m)
    return z.reshape(-1, n, m, z.shape[-1]), mask


def is_square(z: Tensor) -> bool:
    """Whether `z` is [..., n, n, c]."""
    return z.ndim > 2 and z.shape[-2] == z.shape[-3]


def pair_example(width: int, generator: torch.Generator, *, batch: int = 2, length: int = 13) -> Example:
    """A pair tensor and its mask, some residues masked; the masked pairs are not compared."""
    z = torch.randn(batch, length, length, width, generator=generator)
    residues = torch.ones(batch, length)
    residues[0, -3:] = 0.0
    mask = residues[:, :, None] * residues[:, None, :]
    return Example(
        args=(z, mask),
        compare=lambda out: {"update": out[mask.to(out.device) > 0.5]},
        leaves={"z": z},
    )
