"""Rotations and frames with FlashIPA's (OpenFold's) interface, for scripts that hold them. Plain functions of tensors.

Our own layers take these objects, and work with matrices (`foldkernels.modules.rigid`). Two things differ from the
original's: float64 stays float64 (the original makes everything float32), and the quaternion of a matrix comes from a
closed form, because MPS has no eigendecomposition. For rotation matrices the two agree up to the quaternion's sign;
what is no rotation matrix (FlashIPA's README passes random numbers) has no quaternion, and the two differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import roma
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Shape = Sequence[int]
TensorFunction = Callable[[Tensor], Tensor]


class Rotation:
    """Rotations, as matrices or as quaternions (w, x, y, z); indexed, reshaped and moved like a tensor of rotations.

    Args:
        rot_mats: Rotation matrices.
        quats: Quaternions. One of the two is given, and the other computed when it is asked for.
        quats_mask: Where quaternions are normalised; everywhere when None.
        normalize_quats: Whether quaternions are normalised at all.

    Raises:
        ValueError: Not exactly one of the two is given, or its last axes are not [3, 3] or [4].
    """

    def __init__(
        self,
        rot_mats: Float[Tensor, "*batch 3 3"] | None = None,
        quats: Float[Tensor, "*batch 4"] | None = None,
        quats_mask: Tensor | None = None,
        normalize_quats: bool = True,
    ) -> None:
        if (rot_mats is None) == (quats is None):
            raise ValueError("give a Rotation either rot_mats or quats")
        if rot_mats is not None and rot_mats.shape[-2:] != (3, 3):
            raise ValueError(f"rotation matrices end in [3, 3], not in {list(rot_mats.shape[-2:])}")
        if quats is not None and quats.shape[-1] != 4:
            raise ValueError(f"quaternions have 4 elements, not {quats.shape[-1]}")
        self._rot_mats = None if rot_mats is None else _wide(rot_mats)
        self._quats = None
        if quats is not None:
            quats = _wide(quats)
            if normalize_quats:
                unit = F.normalize(quats, dim=-1)
                quats = unit if quats_mask is None else torch.where(quats_mask.bool()[..., None], unit, quats)
            self._quats = quats

    @staticmethod
    def identity(
        shape: Shape,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        requires_grad: bool = True,
        fmt: str = "quat",
    ) -> Rotation:
        """Rotations that turn nothing, of a batch shape.

        Raises:
            ValueError: `fmt` is not "quat" or "rot_mat".
        """
        if fmt == "rot_mat":
            return Rotation(rot_mats=identity_rot_mats(shape, dtype, device, requires_grad))
        if fmt == "quat":
            return Rotation(quats=identity_quats(shape, dtype, device, requires_grad), normalize_quats=False)
        raise ValueError(f"fmt is 'quat' or 'rot_mat', not {fmt!r}")

    def __getitem__(self, index: Any) -> Rotation:
        """The rotations at an index into the batch shape."""
        index = index if isinstance(index, tuple) else (index,)
        return self._map(lambda held, own: held[(*index, *(slice(None),) * own)])

    def __mul__(self, right: Tensor) -> Rotation:
        """Each rotation times a number: a mask over rotations."""
        return self._map(lambda held, own: held * right[(..., *(None,) * own)])

    __rmul__ = __mul__

    @property
    def shape(self) -> torch.Size:
        """The batch shape."""
        return self._rot_mats.shape[:-2] if self._rot_mats is not None else self.get_quats().shape[:-1]

    @property
    def dtype(self) -> torch.dtype:
        """The floating type."""
        return self.get_cur_rot().dtype

    @property
    def device(self) -> torch.device:
        """The device."""
        return self.get_cur_rot().device

    @property
    def requires_grad(self) -> bool:
        """Whether what is held requires a gradient."""
        return self.get_cur_rot().requires_grad

    def reshape(self, new_rots_shape: Shape | None = None) -> Rotation:
        """The same rotations; the shape is that of the tensor that is held, its last axes included."""
        return self if not new_rots_shape else self._map(lambda held, _: held.reshape(tuple(new_rots_shape)))

    def get_rot_mats(self) -> Float[Tensor, "*batch 3 3"]:
        """The rotation matrices."""
        return self._rot_mats if self._rot_mats is not None else quat_to_rot(self.get_quats())

    def get_quats(self) -> Float[Tensor, "*batch 4"]:
        """The quaternions (w, x, y, z); from matrices, those with w >= 0."""
        if self._quats is not None:
            return self._quats
        assert self._rot_mats is not None
        return rot_to_quat(self._rot_mats)

    def get_cur_rot(self) -> Tensor:
        """What is held: matrices or quaternions."""
        held = self._rot_mats if self._rot_mats is not None else self._quats
        assert held is not None
        return held

    def get_rotvec(self, eps: float = 1e-6) -> Float[Tensor, "*batch 3"]:
        """Axis times angle, the angle between 0 and pi.

        Args:
            eps: Added to the half angle that is divided by the sine of.
        """
        quats = self.get_quats()
        quats = torch.where(quats[..., :1] < 0, -quats, quats)
        vector = quats[..., 1:]
        angle = 2 * torch.atan2(torch.linalg.vector_norm(vector, dim=-1), quats[..., 0])
        small = 2 + angle**2 / 12 + 7 * angle**4 / 2880
        return torch.where(angle <= 1e-3, small, angle / torch.sin(angle / 2 + eps))[..., None] * vector

    def compose_q_update_vec(
        self, q_update_vec: Float[Tensor, "*batch 3"], normalize_quats: bool = True, update_mask: Tensor | None = None
    ) -> Rotation:
        """Rotations after turning by the quaternions (1, x, y, z) first.

        Args:
            q_update_vec: x, y and z.
            normalize_quats: Whether the result is normalised.
            update_mask: [*batch, 1], 1 for rotations that change.
        """
        quats = self.get_quats()
        change = quat_multiply_by_vec(quats, q_update_vec)
        if update_mask is not None:
            change = change * update_mask
        mask = None if update_mask is None else update_mask.squeeze(-1)
        return Rotation(quats=quats + change, quats_mask=mask, normalize_quats=normalize_quats)

    def compose_r(self, r: Rotation) -> Rotation:
        """Turn by `r` first, then by these; as matrices."""
        return Rotation(rot_mats=rot_matmul(self.get_rot_mats(), r.get_rot_mats()))

    def compose_q(self, r: Rotation, normalize_quats: bool = True) -> Rotation:
        """Turn by `r` first, then by these; as quaternions."""
        return Rotation(quats=quat_multiply(self.get_quats(), r.get_quats()), normalize_quats=normalize_quats)

    def apply(self, pts: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
        """Points turned."""
        return rot_vec_mul(self.get_rot_mats(), pts)

    def invert_apply(self, pts: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
        """Points turned back."""
        return rot_vec_mul(invert_rot_mat(self.get_rot_mats()), pts)

    def invert(self, mask: Tensor | None = None) -> Rotation:
        """The inverse rotations.

        Args:
            mask: Where quaternions are divided by their squared norm; everywhere when None.
        """
        if self._rot_mats is not None:
            return Rotation(rot_mats=invert_rot_mat(self._rot_mats))
        return Rotation(quats=invert_quat(self.get_quats(), mask), normalize_quats=False)

    def unsqueeze(self, dim: int) -> Rotation:
        """A new axis in the batch shape.

        Raises:
            ValueError: There is no such place.
        """
        if dim >= len(self.shape):
            raise ValueError(f"no axis can be added at {dim} to rotations of shape {tuple(self.shape)}")
        return self._map(lambda held, own: held.unsqueeze(dim if dim >= 0 else dim - own))

    @staticmethod
    def cat(rs: Sequence[Rotation], dim: int) -> Rotation:
        """Rotations one after another along a batch axis, as matrices."""
        return Rotation(rot_mats=torch.cat([r.get_rot_mats() for r in rs], dim=dim if dim >= 0 else dim - 2))

    def map_tensor_fn(self, fn: TensorFunction) -> Rotation:
        """`fn` applied to each element's tensor over the batch shape: to sum an axis away, for instance."""
        if self._rot_mats is not None:
            parts = [fn(part) for part in self._rot_mats.flatten(-2).unbind(-1)]
            return Rotation(rot_mats=torch.stack(parts, dim=-1).unflatten(-1, (3, 3)))
        parts = [fn(part) for part in self.get_quats().unbind(-1)]
        return Rotation(quats=torch.stack(parts, dim=-1), normalize_quats=False)

    def cuda(self) -> Rotation:
        """A copy on the GPU."""
        return self._map(lambda held, _: held.cuda())

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Rotation:
        """A copy on another device, in another type."""
        return self._map(lambda held, _: held.to(device=device, dtype=dtype))

    def detach(self) -> Rotation:
        """The same rotations without a gradient."""
        return self._map(lambda held, _: held.detach())

    def _map(self, change: Callable[[Tensor, int], Tensor]) -> Rotation:
        """What is held, changed by a function of it and of the number of its own axes."""
        if self._rot_mats is not None:
            return Rotation(rot_mats=change(self._rot_mats, 2))
        return Rotation(quats=change(self.get_quats(), 1), normalize_quats=False)


class Rigid:
    """Frames: a `Rotation`, and translations in the unit of whoever made them.

    Args:
        rots: Rotations; those that turn nothing when None.
        trans: Translations; zeros when None.

    Raises:
        ValueError: Neither is given, or the two differ in batch shape or device.
    """

    def __init__(self, rots: Rotation | None, trans: Float[Tensor, "*batch 3"] | None) -> None:
        if rots is None:
            if trans is None:
                raise ValueError("give a Rigid rotations, translations, or both")
            rots = Rotation.identity(trans.shape[:-1], trans.dtype, trans.device, trans.requires_grad)
        if trans is None:
            trans = identity_trans(rots.shape, rots.dtype, rots.device, rots.requires_grad)
        if rots.shape != trans.shape[:-1] or rots.device != trans.device:
            raise ValueError(
                f"rotations of shape {tuple(rots.shape)} on {rots.device} do not go with translations of shape "
                f"{tuple(trans.shape)} on {trans.device}"
            )
        self._rots, self._trans = rots, _wide(trans)

    @staticmethod
    def identity(
        shape: Shape,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        requires_grad: bool = True,
        fmt: str = "quat",
    ) -> Rigid:
        """Frames that move nothing, of a batch shape."""
        return Rigid(
            Rotation.identity(shape, dtype, device, requires_grad, fmt),
            identity_trans(shape, dtype, device, requires_grad),
        )

    def __getitem__(self, index: Any) -> Rigid:
        """The frames at an index into the batch shape."""
        index = index if isinstance(index, tuple) else (index,)
        return Rigid(self._rots[index], self._trans[(*index, slice(None))])

    def __mul__(self, right: Tensor) -> Rigid:
        """Each frame times a number: a mask over frames.

        Raises:
            TypeError: `right` is no tensor.
        """
        if not isinstance(right, Tensor):
            raise TypeError(f"frames are multiplied by a tensor, not by {type(right).__name__}")
        return Rigid(self._rots * right, self._trans * right[..., None])

    __rmul__ = __mul__

    @property
    def shape(self) -> torch.Size:
        """The batch shape."""
        return self._trans.shape[:-1]

    @property
    def device(self) -> torch.device:
        """The device."""
        return self._trans.device

    def reshape(self, new_rots_shape: Shape | None = None, new_trans_shape: Shape | None = None) -> Rigid:
        """The same frames; the shapes are those of the tensors that are held."""
        trans = self._trans.reshape(tuple(new_trans_shape)) if new_trans_shape else self._trans
        return Rigid(self._rots.reshape(new_rots_shape), trans)

    def get_rots(self) -> Rotation:
        """The rotations."""
        return self._rots

    def get_trans(self) -> Float[Tensor, "*batch 3"]:
        """The translations."""
        return self._trans

    def compose_q_update_vec(self, q_update_vec: Float[Tensor, "*batch 6"], update_mask: Tensor | None = None) -> Rigid:
        """Frames after a backbone update (Jumper et al. 2021, Supplementary Algorithm 23).

        Args:
            q_update_vec: x, y and z of the quaternion (1, x, y, z), then a translation in the local frame.
            update_mask: [*batch, 1], 1 for frames that move.
        """
        turn, shift = q_update_vec.split(3, dim=-1)
        shift = self._rots.apply(shift)
        if update_mask is not None:
            shift = shift * update_mask
        return Rigid(self._rots.compose_q_update_vec(turn, update_mask=update_mask), self._trans + shift)

    def compose(self, r: Rigid) -> Rigid:
        """Move by `r` first, then by these."""
        return Rigid(self._rots.compose_r(r._rots), self._rots.apply(r._trans) + self._trans)

    def compose_r(self, rot: Rotation, order: str = "right") -> Rigid:
        """Frames with their rotations turned, their translations kept.

        Raises:
            ValueError: `order` is not "right" (turn by `rot` first) or "left".
        """
        if order not in ("right", "left"):
            raise ValueError(f"order is 'right' or 'left', not {order!r}")
        turned = self._rots.compose_r(rot) if order == "right" else rot.compose_r(self._rots)
        return Rigid(turned, self._trans)

    def apply(self, pts: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
        """Local points into the global frame."""
        return self._rots.apply(pts) + self._trans

    def invert_apply(self, pts: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
        """Global points into the local frame."""
        return self._rots.invert_apply(pts - self._trans)

    def invert(self) -> Rigid:
        """The inverse frames."""
        back = self._rots.invert()
        return Rigid(back, -back.apply(self._trans))

    def map_tensor_fn(self, fn: TensorFunction) -> Rigid:
        """`fn` applied to each element's tensor over the batch shape."""
        return Rigid(self._rots.map_tensor_fn(fn), torch.stack([fn(axis) for axis in self._trans.unbind(-1)], dim=-1))

    def to_tensor_4x4(self) -> Float[Tensor, "*batch 4 4"]:
        """Homogeneous matrices."""
        rows = torch.cat([self._rots.get_rot_mats(), self._trans[..., None]], dim=-1)
        last = rows.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*self.shape, 1, 4)
        return torch.cat([rows, last], dim=-2)

    @staticmethod
    def from_tensor_4x4(t: Float[Tensor, "*batch 4 4"]) -> Rigid:
        """Frames of homogeneous matrices.

        Raises:
            ValueError: The last axes are not [4, 4].
        """
        if t.shape[-2:] != (4, 4):
            raise ValueError(f"homogeneous matrices end in [4, 4], not in {list(t.shape[-2:])}")
        return Rigid(Rotation(rot_mats=t[..., :3, :3]), t[..., :3, 3])

    def to_tensor_7(self) -> Float[Tensor, "*batch 7"]:
        """Quaternions (w, x, y, z), then translations."""
        return torch.cat([self._rots.get_quats(), self._trans], dim=-1)

    @staticmethod
    def from_tensor_7(t: Float[Tensor, "*batch 7"], normalize_quats: bool = False) -> Rigid:
        """Frames of quaternions and translations.

        Raises:
            ValueError: The last axis has not 7 elements.
        """
        if t.shape[-1] != 7:
            raise ValueError(f"a quaternion and a translation have 7 elements, not {t.shape[-1]}")
        return Rigid(Rotation(quats=t[..., :4], normalize_quats=normalize_quats), t[..., 4:])

    @staticmethod
    def from_3_points(
        p_neg_x_axis: Float[Tensor, "*batch 3"],
        origin: Float[Tensor, "*batch 3"],
        p_xy_plane: Float[Tensor, "*batch 3"],
        eps: float = 1e-8,
    ) -> Rigid:
        """Frames at `origin`, by Gram and Schmidt (Jumper et al. 2021, Supplementary Algorithm 21).

        Args:
            p_neg_x_axis: Points on the negative x axis.
            origin: The frames' origins.
            p_xy_plane: Points in the x-y plane, on the side of positive y.
            eps: Added to squared lengths.
        """
        return _frame(origin, origin - p_neg_x_axis, p_xy_plane - origin, eps)

    @staticmethod
    def make_transform_from_reference(
        n_xyz: Float[Tensor, "*batch 3"],
        ca_xyz: Float[Tensor, "*batch 3"],
        c_xyz: Float[Tensor, "*batch 3"],
        eps: float = 1e-20,
    ) -> Rigid:
        """Backbone frames at CA, with C on the positive x axis and N in the x-y plane on the side of positive y.

        Args:
            n_xyz: N atoms.
            ca_xyz: CA atoms.
            c_xyz: C atoms.
            eps: Added to squared lengths.
        """
        return _frame(ca_xyz, c_xyz - ca_xyz, n_xyz - ca_xyz, eps)

    def unsqueeze(self, dim: int) -> Rigid:
        """A new axis in the batch shape.

        Raises:
            ValueError: There is no such place.
        """
        return Rigid(self._rots.unsqueeze(dim), self._trans.unsqueeze(dim if dim >= 0 else dim - 1))

    @staticmethod
    def cat(ts: Sequence[Rigid], dim: int) -> Rigid:
        """Frames one after another along a batch axis."""
        trans = torch.cat([t._trans for t in ts], dim=dim if dim >= 0 else dim - 1)
        return Rigid(Rotation.cat([t._rots for t in ts], dim), trans)

    def apply_rot_fn(self, fn: Callable[[Rotation], Rotation]) -> Rigid:
        """Frames with their rotations changed by a function."""
        return Rigid(fn(self._rots), self._trans)

    def apply_trans_fn(self, fn: TensorFunction) -> Rigid:
        """Frames with their translations changed by a function."""
        return Rigid(self._rots, fn(self._trans))

    def scale_translation(self, trans_scale_factor: float) -> Rigid:
        """Frames with translations in another unit."""
        return self.apply_trans_fn(lambda trans: trans * trans_scale_factor)

    def stop_rot_gradient(self) -> Rigid:
        """Frames whose rotations pass no gradient."""
        return self.apply_rot_fn(Rotation.detach)

    def cuda(self) -> Rigid:
        """A copy on the GPU."""
        return Rigid(self._rots.cuda(), self._trans.cuda())


def create_rigid(rots: Float[Tensor, "*batch 3 3"], trans: Float[Tensor, "*batch 3"]) -> Rigid:
    """Frames from rotation matrices and translations."""
    return Rigid(Rotation(rot_mats=rots), trans)


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


def _wide(x: Tensor) -> Tensor:
    """Frames are never held in 16 bits."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _frame(origin: Tensor, along_x: Tensor, in_plane: Tensor, eps: float) -> Rigid:
    x_axis = _unit(along_x, eps)
    y_axis = _unit(in_plane - x_axis * (x_axis * in_plane).sum(-1, keepdim=True), eps)
    z_axis = torch.linalg.cross(x_axis, y_axis)
    return Rigid(Rotation(rot_mats=torch.stack([x_axis, y_axis, z_axis], dim=-1)), origin)


def _unit(vectors: Tensor, eps: float) -> Tensor:
    return vectors / (vectors.square().sum(-1, keepdim=True) + eps).sqrt()
