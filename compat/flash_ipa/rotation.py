"""Rotations with FlashIPA's (OpenFold's) interface; `rigid.py` says what differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from .rotation_formulas import (
    Shape,
    identity_quats,
    identity_rot_mats,
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
        self._rot_mats = None if rot_mats is None else wide(rot_mats)
        self._quats = None
        if quats is not None:
            quats = wide(quats)
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
