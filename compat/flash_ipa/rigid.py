"""Rotations and frames with FlashIPA's (OpenFold's) interface, for scripts that hold them. Plain functions of tensors.

Our own layers take these objects, and work with matrices (`foldkernels.modules.rigid`). Two things differ from the
original's: float64 stays float64 (the original makes everything float32), and the quaternion of a matrix comes from a
closed form, because MPS has no eigendecomposition. For rotation matrices the two agree up to the quaternion's sign;
what is no rotation matrix (FlashIPA's README passes random numbers) has no quaternion, and the two differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .rotation import Rotation, TensorFunction
from .rotation_formulas import (
    Shape,
    identity_quats,
    identity_rot_mats,
    identity_trans,
    invert_quat,
    invert_rot_mat,
    quat_multiply,
    quat_multiply_by_vec,
    quat_to_rot,
    rot_matmul,
    rot_to_quat,
    rot_vec_mul,
    wide,
)

#: All of it, as scripts import it from the original's file.
__all__ = [
    "Rigid",
    "Rotation",
    "create_rigid",
    "identity_quats",
    "identity_rot_mats",
    "identity_trans",
    "invert_quat",
    "invert_rot_mat",
    "quat_multiply",
    "quat_multiply_by_vec",
    "quat_to_rot",
    "rot_matmul",
    "rot_to_quat",
    "rot_vec_mul",
]


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
        self._rots, self._trans = rots, wide(trans)

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


def _frame(origin: Tensor, along_x: Tensor, in_plane: Tensor, eps: float) -> Rigid:
    x_axis = _unit(along_x, eps)
    y_axis = _unit(in_plane - x_axis * (x_axis * in_plane).sum(-1, keepdim=True), eps)
    z_axis = torch.linalg.cross(x_axis, y_axis)
    return Rigid(Rotation(rot_mats=torch.stack([x_axis, y_axis, z_axis], dim=-1)), origin)


def _unit(vectors: Tensor, eps: float) -> Tensor:
    return vectors / (vectors.square().sum(-1, keepdim=True) + eps).sqrt()
