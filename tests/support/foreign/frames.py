"""Frames with the methods of OpenFold's `Rigid` that an IPA calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Rotation:
    def __init__(self, matrices: Tensor) -> None:
        self._matrices = matrices

    def get_rot_mats(self) -> Tensor:
        return self._matrices


class Rigid:
    def __init__(self, rotmats: Tensor, trans: Tensor) -> None:
        self._rotmats, self._trans = rotmats, trans

    def __getitem__(self, index: Any) -> Rigid:
        index = index if isinstance(index, tuple) else (index,)
        return Rigid(self._rotmats[(*index, slice(None), slice(None))], self._trans[(*index, slice(None))])

    def apply(self, points: Tensor) -> Tensor:
        return torch.einsum("...xy,...y->...x", self._rotmats, points) + self._trans

    def invert_apply(self, points: Tensor) -> Tensor:
        return torch.einsum("...yx,...y->...x", self._rotmats, points - self._trans)

    def get_rots(self) -> Rotation:
        return Rotation(self._rotmats)

    def get_trans(self) -> Tensor:
        return self._trans


def random_rigid(batch: int, length: int, seed: int = 0) -> Rigid:
    generator = torch.Generator().manual_seed(seed)
    rotmats = torch.linalg.qr(torch.randn(batch, length, 3, 3, generator=generator)).Q
    rotmats = rotmats * torch.linalg.det(rotmats)[..., None, None]
    return Rigid(rotmats, torch.randn(batch, length, 3, generator=generator))
