"""Arithmetic of rotation matrices and of quaternions (w, x, y, z), under OpenFold's names: functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import roma
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Shape = Sequence[int]


def rot_matmul(a: Float[Tensor, "*batch 3 3"], b: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 3 3"]:
    """The product of rotation matrices; written out, because autocast and TF32 round matrix products."""
    return torch.stack([rot_vec_mul(a, column) for column in b.unbind(-1)], dim=-1)


def rot_vec_mul(r: Float[Tensor, "*batch 3 3"], t: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
    """Vectors turned by rotation matrices; written out likewise."""
    x, y, z = t.unbind(-1)
    return torch.stack([row[..., 0] * x + row[..., 1] * y + row[..., 2] * z for row in r.unbind(-2)], dim=-1)


def identity_rot_mats(
    batch_dims: Shape,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    requires_grad: bool = True,
) -> Float[Tensor, "*batch 3 3"]:
    """Matrices that turn nothing, of a batch shape."""
    return torch.eye(3, dtype=dtype, device=device, requires_grad=requires_grad).expand(*batch_dims, 3, 3)


def identity_trans(
    batch_dims: Shape,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    requires_grad: bool = True,
) -> Float[Tensor, "*batch 3"]:
    """Translations that shift nothing, of a batch shape."""
    return torch.zeros((*batch_dims, 3), dtype=dtype, device=device, requires_grad=requires_grad)


def identity_quats(
    batch_dims: Shape,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    requires_grad: bool = True,
) -> Float[Tensor, "*batch 4"]:
    """Quaternions that turn nothing, of a batch shape."""
    one = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=dtype, device=device)
    return one.repeat(*batch_dims, 1).requires_grad_(requires_grad)


def quat_to_rot(quat: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 3 3"]:
    """The matrices of quaternions (w, x, y, z); scaled by the squared norm, where that is not one."""
    w, x, y, z = quat.unbind(-1)
    rows = [
        [w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def rot_to_quat(rot: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 4"]:
    """The unit quaternions (w, x, y, z) of rotation matrices, those with w >= 0.

    Raises:
        ValueError: The last axes are not [3, 3].
    """
    if rot.shape[-2:] != (3, 3):
        raise ValueError(f"rotation matrices end in [3, 3], not in {list(rot.shape[-2:])}")
    quats = roma.quat_xyzw_to_wxyz(roma.rotmat_to_unitquat(rot))
    return torch.where(quats[..., :1] < 0, -quats, quats)


def quat_multiply(quat1: Float[Tensor, "*batch 4"], quat2: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    """Hamilton's product of quaternions (w, x, y, z)."""
    (w1, x1, y1, z1), (w2, x2, y2, z2) = quat1.unbind(-1), quat2.unbind(-1)
    parts = [
        w1 * w2 - x1 * x2 - y1 * y2 - z1 * z2,
        w1 * x2 + x1 * w2 + y1 * z2 - z1 * y2,
        w1 * y2 - x1 * z2 + y1 * w2 + z1 * x2,
        w1 * z2 + x1 * y2 - y1 * x2 + z1 * w2,
    ]
    return torch.stack(parts, dim=-1)


def quat_multiply_by_vec(quat: Float[Tensor, "*batch 4"], vec: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 4"]:
    """Hamilton's product with the quaternions (0, x, y, z)."""
    return quat_multiply(quat, F.pad(vec, (1, 0)))


def invert_rot_mat(rot_mat: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 3 3"]:
    """The inverse of rotation matrices."""
    return rot_mat.transpose(-1, -2)


def invert_quat(quat: Float[Tensor, "*batch 4"], mask: Tensor | None = None) -> Float[Tensor, "*batch 4"]:
    """The inverse of quaternions.

    Args:
        quat: Quaternions.
        mask: Where they are divided by their squared norm: elsewhere it may be zero. Everywhere when None.
    """
    conjugate = torch.cat([quat[..., :1], -quat[..., 1:]], dim=-1)
    norm = quat.square().sum(-1, keepdim=True)
    if mask is not None:
        norm = torch.where(mask.bool()[..., None], norm, torch.ones_like(norm))
    return conjugate / norm


def wide(x: Tensor) -> Tensor:
    """Frames are never held in 16 bits."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
