"""Writes backbones as PDB files and sequences as FASTA. Lengths are Angstrom."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ...files.atomic import write_whole
from .backbone import ATOM37_BACKBONE
from .residue_types import NAMES

_CHAIN_NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def write_pdb(
    path: str | os.PathLike[str],
    atom37: Float[Tensor, "*t n 37 3"],
    aatypes: Shaped[Tensor, "*t n"],
    *,
    b_factors: Float[Tensor, " n"] | None = None,
    chain_index: Int[Tensor, " n"] | None = None,
    residue_index: Int[Tensor, " n"] | None = None,
) -> Path:
    """Writes the backbone of one structure, or of each step of a trajectory as a model.

    All residues get N, CA, C, CB and O, glycines too, and are counted from 0 in chain A unless told otherwise:
    Multiflow's files are like that, and tools that were made for them expect it.

    Args:
        path: The file. It is written aside and renamed.
        atom37: Positions, Angstrom; ``[n, 37, 3]`` or, for a trajectory, ``[t, n, 37, 3]``.
        aatypes: Residue types, whole numbers from 0 to 20; 20 is written as UNK.
        b_factors: One for each residue; Multiflow puts 100 where a residue was sampled. 0 by default.
        chain_index: Number of each residue's chain; the lowest becomes chain A.
        residue_index: Number of each residue.

    Returns:
        The path.

    Raises:
        ValueError: Shapes that do not fit, unknown types, more than 62 chains, or coordinates that are not finite or
            too large for the format's columns.
    """
    import gemmi

    if atom37.ndim not in (3, 4) or atom37.shape[-2:] != (37, 3) or aatypes.shape != atom37.shape[:-2]:
        raise ValueError(
            f"atom37 of shape {tuple(atom37.shape)} with aatypes of shape {tuple(aatypes.shape)}: expected [n, 37, 3] "
            f"with [n], or [t, n, 37, 3] with [t, n]"
        )
    if atom37.numel() == 0:
        raise ValueError(f"nothing to write: atom37 has shape {tuple(atom37.shape)}")
    num_res = atom37.shape[-3]
    frames = atom37.detach().cpu().double().reshape(-1, num_res, 37, 3)
    for name, given in (("b_factors", b_factors), ("chain_index", chain_index), ("residue_index", residue_index)):
        if given is not None and tuple(given.shape) != (num_res,):
            raise ValueError(f"{name} has shape {tuple(given.shape)}, expected ({num_res},)")
    types = aatypes.detach().cpu().reshape(-1, num_res)
    if not bool(((types >= 0) & (types < len(NAMES)) & (types == types.long())).all()):
        raise ValueError(f"aatypes must be whole numbers from 0 to {len(NAMES) - 1}")
    atoms = frames[:, :, : len(ATOM37_BACKBONE)]
    if not bool((atoms.abs() < 1e6).all()):  # false for NaN too
        raise ValueError(f"{Path(path).name}: coordinates are not finite, or of a million Angstrom and more")

    structure = gemmi.Structure()
    model = _model(num_res, b_factors, chain_index, residue_index)
    for number, (frame, row) in enumerate(zip(atoms.tolist(), types.long().tolist(), strict=True), start=1):
        residues = iter(zip(frame, row, strict=True))
        for chain in model:
            for residue in chain:
                positions, index = next(residues)
                residue.name = NAMES[index]
                for atom, (x, y, z) in zip(residue, positions, strict=True):
                    atom.pos = gemmi.Position(x, y, z)
        model.num = number
        structure.add_model(model)  # a copy
    options = gemmi.PdbWriteOptions()
    options.cryst1_record = False
    return write_whole(path, structure.make_pdb_string(options))


def _model(num_res: int, b_factors: Tensor | None, chain_index: Tensor | None, residue_index: Tensor | None) -> Any:
    """A model whose atoms stand nowhere yet."""
    import gemmi

    temperatures = [0.0] * num_res if b_factors is None else b_factors.tolist()
    chain_numbers = [0] * num_res if chain_index is None else (chain_index - chain_index.min()).tolist()
    numbers = list(range(num_res)) if residue_index is None else residue_index.tolist()
    if max(chain_numbers) >= len(_CHAIN_NAMES):
        raise ValueError(f"chain numbers span {max(chain_numbers) + 1}, a PDB file names at most {len(_CHAIN_NAMES)}")
    if chain_numbers != sorted(chain_numbers):
        raise ValueError("chain_index must not decrease: the residues of a chain stand together in a PDB file")
    model = gemmi.Model(1)
    for position in range(num_res):
        name = _CHAIN_NAMES[chain_numbers[position]]
        if not len(model) or model[len(model) - 1].name != name:
            model.add_chain(gemmi.Chain(name))
        residue = gemmi.Residue()
        residue.seqid = gemmi.SeqId(int(numbers[position]), " ")
        residue.het_flag = "A"
        residue.entity_type = gemmi.EntityType.Polymer
        for atom_name in ATOM37_BACKBONE:
            atom = gemmi.Atom()
            atom.name = atom_name
            atom.element = gemmi.Element(atom_name[0])
            atom.b_iso = float(temperatures[position])
            residue.add_atom(atom)
        model[len(model) - 1].add_residue(residue)
    return model


def write_fasta(path: str | os.PathLike[str], sequences: Mapping[str, str]) -> Path:
    """Writes sequences by name, each on one line. The file is written aside and renamed."""
    return write_whole(path, "".join(f">{name}\n{sequence}\n" for name, sequence in sequences.items()))
