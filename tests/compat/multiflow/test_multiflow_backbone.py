"""Frames to atoms and back, against the original."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from foldkernels.compat.multiflow.structures.backbone import ATOM37_BACKBONE, atom37_from_trans_rot, frames_from_atoms

GOLDEN = load_file(Path(__file__).parents[2] / "goldens" / "multiflow" / "geometry" / "backbone.safetensors")


@pytest.mark.parametrize("masked", [True, False])
def test_atoms_are_the_originals(masked: bool) -> None:
    mask = GOLDEN["res_mask"] if masked else None
    atoms = atom37_from_trans_rot(GOLDEN["trans"], GOLDEN["rotmats"], mask)
    assert atoms.shape == (3, 9, 37, 3)
    assert not atoms[..., 5:, :].any()
    expected = GOLDEN["atom37" if masked else "atom37_no_mask"]
    torch.testing.assert_close(atoms[..., :5, :], expected, rtol=0, atol=1e-5)
    assert not torch.equal(GOLDEN["atom37"], GOLDEN["atom37_no_mask"])  # so the mask is tested


def test_the_last_residue_and_a_lone_one_have_an_oxygen() -> None:
    atoms = atom37_from_trans_rot(GOLDEN["trans"][:, :1], GOLDEN["rotmats"][:, :1])
    bond = atoms[..., ATOM37_BACKBONE.index("O"), :] - atoms[..., ATOM37_BACKBONE.index("C"), :]
    torch.testing.assert_close(bond.norm(dim=-1), torch.full((3, 1), 1.23))


def test_atoms_give_back_their_frames() -> None:
    atoms = atom37_from_trans_rot(GOLDEN["trans"].double(), GOLDEN["rotmats"].double())
    rotmats, trans = frames_from_atoms(*atoms[..., :3, :].unbind(-2))
    # OpenFold's eps of 1e-8 under the root shortens the axes by 2e-9.
    torch.testing.assert_close(rotmats, GOLDEN["rotmats"].double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(trans, GOLDEN["trans"].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    atoms = atom37_from_trans_rot(GOLDEN["trans"].to(dtype), GOLDEN["rotmats"].to(dtype))
    assert atoms.dtype == dtype
    assert frames_from_atoms(*atoms[..., :3, :].unbind(-2))[0].dtype == dtype


def test_coincident_atoms_give_no_nan() -> None:
    atoms = atom37_from_trans_rot(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, 3))
    assert atoms.isfinite().all()
