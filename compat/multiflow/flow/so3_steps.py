"""Steps along geodesics of SO(3), with the conventions that Multiflow samples with.

Products of 3 x 3 matrices are written out as sums: a matmul would round to TF32 or bfloat16 where the caller allows
that for the network, and 500 such steps leave no rotation.
"""

from __future__ import annotations

import math

import roma
import torch
from jaxtyping import Float
from torch import Tensor

NEAR_PI = 1e-2 + 1e-5 * math.pi
"""Angles this close to pi (radians) take their axis from the symmetric part of the matrix."""


def compose(left: Float[Tensor, "*b 3 3"], right: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 3 3"]:
    """``left @ right``, in the precision of the inputs whatever matmul may round to."""
    return (left[..., :, :, None] * right[..., None, :, :]).sum(-2)


def rotation_vector(rotmats: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 3"]:
    """Logarithm of rotation matrices: axis times angle, the angle from 0 to pi (radians).

    Not ``roma.rotmat_to_rotvec``, which agrees with this to float32 rounding except within ``NEAR_PI`` of pi. There the
    two ways round are about equally long and a sampler has to pick one. The original picks the axis whose largest
    component is positive, from the square roots of the diagonal of (I + R) / 2 (right to 5e-3). One residue in 160 of
    uniform noise starts there: another choice would turn it the other way round, and the same seed would no longer give
    the sample that it gave with the original code.

    Source: Nurlanov, "Exploring SO(3) logarithmic map", 2021, as in Multiflow's ``so3_utils``.
    """
    skew = torch.stack(
        (
            rotmats[..., 2, 1] - rotmats[..., 1, 2],
            rotmats[..., 0, 2] - rotmats[..., 2, 0],
            rotmats[..., 1, 0] - rotmats[..., 0, 1],
        ),
        dim=-1,
    )
    sine = torch.linalg.vector_norm(skew, dim=-1) / 2
    diagonal = rotmats.diagonal(dim1=-2, dim2=-1)
    angle = torch.atan2(sine, (diagonal.sum(-1) - 1) / 2)

    tiny = angle <= 1e-8  # sine may be an exact zero: divide by its series
    scale = torch.where(tiny, 0.5 / (1 - angle.square() / 6), angle / (2 * sine).where(~tiny, 1.0))
    general = skew * scale[..., None]

    identity = torch.eye(3, device=rotmats.device, dtype=rotmats.dtype)
    outer = (rotmats + identity) / 2
    outer = torch.where(identity > 0, outer.clamp(min=0), outer)
    squares = outer.diagonal(dim1=-2, dim2=-1)
    largest = torch.linalg.vector_norm(outer, dim=-1).argmax(dim=-1)
    row = torch.take_along_dim(outer, largest[..., None, None], dim=-2).squeeze(-2)
    half_turn = squares.clamp(min=1e-8).sqrt() * row.sign() * angle[..., None]

    return torch.where(((angle - math.pi).abs() <= NEAR_PI)[..., None], half_turn, general)


def geodesic(
    fraction: float | Tensor, target: Float[Tensor, "*b 3 3"], start: Float[Tensor, "*b 3 3"]
) -> Float[Tensor, "*b 3 3"]:
    """The rotation at ``fraction`` of the way from ``start`` (0) to ``target`` (1); more than 1 goes beyond it.

    Args:
        fraction: A number, or a tensor that broadcasts against ``[*b, 1]``.
        target: Rotation matrices.
        start: Rotation matrices.
    """
    vector = rotation_vector(compose(start.transpose(-1, -2), target))
    return compose(start, roma.rotvec_to_rotmat(fraction * vector))
