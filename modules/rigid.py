"""Rigid frames: one rotation and one translation a residue."""

from typing import Protocol, Self, runtime_checkable

import roma
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


@runtime_checkable
class HasFrames(Protocol):
    """Anything that OpenFold's code would call a rigid: it gives rotation matrices and translations."""

    def get_rots(self) -> "HasRotations": ...  # noqa: D102

    def get_trans(self) -> Tensor: ...  # noqa: D102


class HasRotations(Protocol):
    """Rotations that can be asked for their matrices."""

    def get_rot_mats(self) -> Tensor: ...  # noqa: D102


class Rigid:
    """Frames of residues: x_global = R x_local + t.

    Args:
        rotmats: Rotation matrices.
        trans: Translations, in the unit of whoever made them: the trunk works in nanometres.
    """

    def __init__(self, rotmats: Float[Tensor, "*batch n 3 3"], trans: Float[Tensor, "*batch n 3"]) -> None:
        self.rotmats = rotmats
        self.trans = trans

    @classmethod
    def of(cls, frames: "HasFrames | Rigid") -> "Rigid":
        """A `Rigid` from anything with `get_rots().get_rot_mats()` and `get_trans()`.

        Raises:
            TypeError: `frames` has neither.
        """
        if isinstance(frames, cls):
            return frames
        if isinstance(frames, HasFrames):
            return cls(frames.get_rots().get_rot_mats(), frames.get_trans())
        raise TypeError(
            f"frames are a Rigid, or an object with get_rots().get_rot_mats() and get_trans(), "
            f"not {type(frames).__name__}"
        )

    def get_rots(self) -> Self:
        """The rotations, as OpenFold's code asks for them."""
        return self

    def get_rot_mats(self) -> Float[Tensor, "*batch n 3 3"]:
        """The rotation matrices."""
        return self.rotmats

    def get_trans(self) -> Float[Tensor, "*batch n 3"]:
        """The translations."""
        return self.trans

    def scale_translation(self, factor: float) -> "Rigid":
        """The same frames with translations in another unit."""
        return Rigid(self.rotmats, self.trans * factor)

    def apply(self, points: Float[Tensor, "b n *points 3"]) -> Float[Tensor, "b n *points 3"]:
        """Local points into the global frame; any number of axes may stand between the residues and the coordinates."""
        rotmats, trans = self._spread(points)
        return _rotate(rotmats, points) + trans

    def invert_apply(self, points: Float[Tensor, "b n *points 3"]) -> Float[Tensor, "b n *points 3"]:
        """Global points into the local frame."""
        rotmats, trans = self._spread(points)
        return _rotate(rotmats.transpose(-1, -2), points - trans)

    def compose_update(
        self, update: Float[Tensor, "*batch n 6"], mask: Float[Tensor, "*batch n"] | None = None
    ) -> "Rigid":
        """Frames after a backbone update (Jumper et al. 2021, Supplementary Algorithm 23).

        Args:
            update: Per residue the vector part of a quaternion (1, b, c, d), then a translation in the local frame.
            mask: 1 for residues that move, 0 for those that stay.
        """
        update = update.to(self.trans.dtype)
        if mask is not None:
            update = update * mask[..., None].to(update.dtype)
        vector, shift = update.split(3, dim=-1)
        quaternion = F.normalize(torch.cat([vector, torch.ones_like(vector[..., :1])], dim=-1), dim=-1)
        turn = roma.unitquat_to_rotmat(quaternion)
        # The product written out: under TF32 or autocast a matrix product would round the frames.
        rotmats = torch.stack([_rotate(self.rotmats, column) for column in turn.unbind(-1)], dim=-1)
        return Rigid(rotmats, self.trans + _rotate(self.rotmats, shift))

    def _spread(self, points: Tensor) -> tuple[Tensor, Tensor]:
        between = (1,) * (points.ndim - self.trans.ndim)
        lead = self.trans.shape[:-1]
        return self.rotmats.reshape(*lead, *between, 3, 3), self.trans.reshape(*lead, *between, 3)


def _rotate(rotmats: Tensor, points: Tensor) -> Tensor:
    """Column by column: a matrix product would be rounded under TF32 and autocast, and a sum over three is slow."""
    x, y, z = points.split(1, dim=-1)
    return rotmats[..., 0] * x + rotmats[..., 1] * y + rotmats[..., 2] * z
