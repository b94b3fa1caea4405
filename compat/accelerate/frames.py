"""Frames for the proof: they do what OpenFold's `Rigid` does in an IPA, without importing the other project's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...modules.rigid import HasRotations, Rigid


class ExampleFrames:
    """One frame a residue, with the methods that the originals' layers call.

    Args:
        rotmats: Rotation matrices [..., 3, 3].
        trans: Translations [..., 3].
    """

    def __init__(self, rotmats: Tensor, trans: Tensor) -> None:
        self.rotmats = rotmats
        self.trans = trans

    def __getitem__(self, index: Any) -> ExampleFrames:
        index = index if isinstance(index, tuple) else (index,)
        return ExampleFrames(self.rotmats[(*index, slice(None), slice(None))], self.trans[(*index, slice(None))])

    def apply(self, points: Tensor) -> Tensor:
        """Local points into the global frame; the axes are broadcast."""
        return (self.rotmats @ points[..., None])[..., 0] + self.trans

    def invert_apply(self, points: Tensor) -> Tensor:
        """Global points into the local frame."""
        return (self.rotmats.transpose(-1, -2) @ (points - self.trans)[..., None])[..., 0]

    def apply_inverse_to_point(self, point: Any) -> Any:
        """The same of a vector that carries its x, y and z, as OpenFold's multimer has them."""
        local = self.invert_apply(torch.stack([point.x, point.y, point.z], dim=-1))
        return type(point)(*local.unbind(-1))

    def get_rots(self) -> HasRotations:
        """The rotations."""
        return Rigid(self.rotmats, self.trans)

    def get_trans(self) -> Tensor:
        """The translations."""
        return self.trans


def example_frames(batch: int, length: int, generator: torch.Generator) -> ExampleFrames:
    """Random rotations, and a random walk in nanometres with the steps of a chain."""
    rotmats = torch.linalg.qr(torch.randn(batch, length, 3, 3, generator=generator)).Q
    rotmats = rotmats * torch.linalg.det(rotmats)[..., None, None]  # a reflection becomes a rotation
    steps = torch.nn.functional.normalize(torch.randn(batch, length, 3, generator=generator), dim=-1)
    return ExampleFrames(rotmats, torch.cumsum(0.38 * steps, dim=1))
