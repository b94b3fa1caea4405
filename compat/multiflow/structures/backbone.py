"""Backbone frames to atoms, and atoms to backbone frames. Lengths are Angstrom.

A frame is a rotation matrix and the position of CA. Its x axis points from CA to C, and N lies in the upper half of the
xy plane (AlphaFold 2, algorithm 21).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

ATOM37_BACKBONE = ("N", "CA", "C", "CB", "O")
"""Names of the atom37 slots 0 to 4, the only ones a backbone fills."""

_N, _CA, _C, _CB, _O = range(5)

# Alanine's idealised atoms in its own frame, Angstrom: the `rigid_group_atom_positions` of AlphaFold 2. Every residue
# gets alanine's, whatever its type, as in Multiflow.
_IDEAL = ((-0.525, 1.363, 0.0), (0.0, 0.0, 0.0), (1.526, 0.0, 0.0), (-0.529, -0.774, -1.205))
_C_O_BOND = 1.23


def _unit(vector: Tensor) -> Tensor:
    """Divides by the length; coincident atoms give a zero vector, not NaN."""
    length: Tensor = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    return vector / (length + 1e-7)


def atom37_from_trans_rot(
    trans: Float[Tensor, "b n 3"],
    rotmats: Float[Tensor, "b n 3 3"],
    res_mask: Float[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b n 37 3"]:
    """Places the backbone atoms of frames: N, CA, C, CB and O in AlphaFold's 37 slots, the others zero.

    O lies 1.23 from C, away from CA and from the next residue's N. Where there is no next residue (the last one, or
    before a masked one) it points along the sum of the directions from CA to C and from CA to N.

    Args:
        trans: Positions of CA, Angstrom.
        rotmats: Rotation matrices of the frames.
        res_mask: Above 0.5, the residue exists. Its only effect is on the O of the residue before it.

    Returns:
        Positions, Angstrom, of the inputs' dtype and device.

    Source: Multiflow's ``data/all_atom.py`` (``atom37_from_trans_rot``).
    """
    ideal = torch.tensor(_IDEAL, dtype=trans.dtype, device=trans.device)
    # A written-out product: exact in the inputs' precision under autocast and TF32 too.
    atoms = (rotmats[..., None, :, :] * ideal[:, None, :]).sum(-1) + trans[..., None, :]

    atom37 = trans.new_zeros(*trans.shape[:-1], 37, 3)
    atom37[..., :_O, :] = atoms
    n, ca, c = atoms[..., _N, :], atoms[..., _CA, :], atoms[..., _C, :]
    ca_to_c = _unit(c - ca)
    outward = _unit(ca_to_c + _unit(n - ca))
    if trans.shape[-2] > 1:
        next_n_to_c = _unit(c[..., :-1, :] - n[..., 1:, :])
        towards_o = _unit(ca_to_c[..., :-1, :] + next_n_to_c)
        if res_mask is not None:
            towards_o = torch.where(res_mask[..., 1:, None] > 0.5, towards_o, outward[..., :-1, :])
        outward = torch.cat((towards_o, outward[..., -1:, :]), dim=-2)
    atom37[..., _O, :] = c + outward * _C_O_BOND
    return atom37


def frames_from_atoms(
    n: Float[Tensor, "*b 3"], ca: Float[Tensor, "*b 3"], c: Float[Tensor, "*b 3"]
) -> tuple[Float[Tensor, "*b 3 3"], Float[Tensor, "*b 3"]]:
    """Frames of residues from three of their atoms, any unit of length.

    Args:
        n: Positions of the backbone nitrogens.
        ca: Positions of the alpha carbons.
        c: Positions of the carbonyl carbons.

    Returns:
        Rotation matrices, and translations (which are ``ca``), of the inputs' dtype. Three atoms on one line have no
        frame: they give a matrix that is no rotation, and ``structures.read_structure`` leaves such residues out.

    Source: AlphaFold 2, algorithm 21 (rigidFrom3Points), with OpenFold's eps of 1e-8 under the root.
    """

    def unit(vector: Tensor) -> Tensor:
        return vector / (vector.square().sum(-1, keepdim=True) + 1e-8).sqrt()

    x = unit(c - ca)
    to_n = n - ca
    y = unit(to_n - x * (x * to_n).sum(-1, keepdim=True))
    return torch.stack((x, y, torch.linalg.cross(x, y)), dim=-1), ca
