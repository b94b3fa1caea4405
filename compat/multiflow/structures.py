"""Reads the backbones of PDB and mmCIF files. Lengths are Angstrom."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ..errors import BadInput
from .backbone import frames_from_atoms
from .residues import sequence_from_types, types_from_sequence
from .structure_files import write_fasta, write_pdb

__all__ = ["Backbone", "read_structure", "write_fasta", "write_pdb"]

_ATOMS = ("N", "CA", "C")


@dataclass(frozen=True, eq=False)
class Backbone:
    """The residues of a structure whose N, CA and C are all known.

    Attributes:
        name: The file's name without its endings, and the chains that were asked for.
        trans: Positions of CA, Angstrom, relative to their mean unless ``center`` was False.
        rotmats: Rotation matrices of the frames.
        aatypes: Residue types, 20 where unknown.
        chain_index: Number of the chain, from 1, in the file's order.
        residue_index: The file's residue number, counted from 1 at each chain's lowest.
        res_mask: True for every residue here: those without a frame are left out.
        chains: The chains' names in the file.
        skipped: A line for each residue that was left out, saying why.
    """

    name: str
    trans: Float[Tensor, "n 3"]
    rotmats: Float[Tensor, "n 3 3"]
    aatypes: Int64[Tensor, " n"]
    chain_index: Int64[Tensor, " n"]
    residue_index: Int64[Tensor, " n"]
    res_mask: Bool[Tensor, " n"]
    chains: tuple[str, ...]
    skipped: tuple[str, ...]

    @property
    def num_res(self) -> int:
        """Number of residues."""
        return len(self.aatypes)

    @property
    def sequence(self) -> str:
        """One-letter codes, X where the type is unknown."""
        return sequence_from_types(self.aatypes.tolist())


def read_structure(
    path: str | os.PathLike[str], *, chain: str | Sequence[str] | None = None, center: bool = True
) -> Backbone:
    """Reads the backbone frames and residue types of the proteins in a PDB or mmCIF file (also gzipped).

    Of several models the first is read, of alternative locations the most occupied. Modified amino acids count as the
    one they come from (MSE as MET). Water, ligands and nucleic acids are passed over.

    Args:
        path: The file; what it is is told by its content.
        chain: Name or names of the chains to read (``auth_asym_id`` of an mmCIF); all by default.
        center: Moves the mean of the CA positions to the origin, as Multiflow does with its inputs.

    Returns:
        The residues that have N, CA and C. Those that have not are listed in ``skipped``, and one warning counts them.

    Raises:
        BadInput: No such file, no structure in it, no such chain, no residue with a backbone, or coordinates that are
            not finite.
    """
    path = Path(path)
    structure = _load(path)
    wanted = None if chain is None else ([chain] if isinstance(chain, str) else list(chain))
    names = [part.name for part in structure[0]] if len(structure) else []
    for name in wanted or ():
        if name not in names:
            raise BadInput(f"{path} has no chain {name!r}: it has {', '.join(names) or 'none'}")

    positions: list[list[list[float]]] = []
    letters: list[str] = []
    chain_numbers: list[int] = []
    residue_numbers: list[int] = []
    chains: list[str] = []
    skipped: list[str] = []
    for part in structure[0] if len(structure) else ():
        if wanted is not None and part.name not in wanted:
            continue
        first = len(residue_numbers)
        for residue, letter in _amino_acids(part):
            label = f"{part.name} {residue.seqid} {residue.name}"
            atoms = _backbone_atoms(residue)
            missing = [name for name in _ATOMS if name not in atoms]
            if missing:
                skipped.append(f"{label}: no {', '.join(missing)}")
                continue
            xyz = [[atoms[name].pos.x, atoms[name].pos.y, atoms[name].pos.z] for name in _ATOMS]
            if not torch.tensor(xyz).isfinite().all():
                raise BadInput(f"{path}: residue {label} has coordinates that are not finite numbers")
            if _on_a_line(xyz):
                skipped.append(f"{label}: N, CA and C lie on one line")
                continue
            if part.name not in chains:
                chains.append(part.name)
            positions.append(xyz)
            letters.append(letter)
            chain_numbers.append(len(chains))
            residue_numbers.append(residue.seqid.num if residue.seqid.num is not None else len(residue_numbers))
        lowest = min(residue_numbers[first:], default=1)
        residue_numbers[first:] = [number - lowest + 1 for number in residue_numbers[first:]]

    if not positions:
        where = f" in chain {', '.join(wanted)}" if wanted else ""
        left_out = f" ({len(skipped)} left out, the first: {skipped[0]})" if skipped else ""
        raise BadInput(f"{path} holds no amino acid with the atoms N, CA and C{where}{left_out}")
    if skipped:
        total = len(positions) + len(skipped)
        warnings.warn(
            f"{path}: {len(skipped)} of {total} residues have no backbone frame and were left out, "
            f"the first: {skipped[0]}",
            stacklevel=2,
        )

    # In double precision until centred: files put proteins hundreds of Angstrom from the origin.
    n, ca, c = torch.tensor(positions, dtype=torch.float64).unbind(1)
    rotmats, trans = frames_from_atoms(n, ca, c)
    if center:
        trans = trans - trans.mean(dim=0)
    return Backbone(
        name="_".join([path.name.split(".")[0] or path.name, *(wanted or ())]),
        trans=trans.float(),
        rotmats=rotmats.float(),
        aatypes=torch.tensor(types_from_sequence("".join(letters))),
        chain_index=torch.tensor(chain_numbers),
        residue_index=torch.tensor(residue_numbers),
        res_mask=torch.ones(len(positions), dtype=torch.bool),
        chains=tuple(chains),
        skipped=tuple(skipped),
    )


def _load(path: Path) -> Any:
    import gemmi  # here, so that sampling without files needs no gemmi

    if not path.exists():
        raise BadInput(f"no such file: {path}")
    if not path.is_file():
        raise BadInput(f"{path} is no file")
    try:
        structure = gemmi.read_structure(str(path), format=gemmi.CoorFormat.Detect)
    except (RuntimeError, ValueError, OSError) as error:  # UnicodeDecodeError is a ValueError
        raise BadInput(f"{path} cannot be read as PDB or mmCIF: {error}") from error
    structure.setup_entities()
    return structure


def _amino_acids(chain: Any) -> Iterator[tuple[Any, str]]:
    """Residues of the chain's protein, and their one-letter codes (X where unknown)."""
    import gemmi

    for residue in chain.first_conformer():
        info = gemmi.find_tabulated_residue(residue.name)
        in_polymer = residue.entity_type == gemmi.EntityType.Polymer
        if residue.het_flag == "H" and not in_polymer:
            continue  # a ligand, even if it is an amino acid
        # A residue that no table knows is taken if it stands in a polymer and has a CA.
        if info.is_amino_acid() or (not info.found() and in_polymer and residue.find_atom("CA", "*")):
            letter = info.one_letter_code.upper() if info.found() else "X"
            yield residue, letter


def _backbone_atoms(residue: Any) -> dict[str, Any]:
    """N, CA and C, all of the same alternative location: the one that is occupied most."""
    candidates = [atom for atom in residue if atom.name in _ATOMS]
    occupied: dict[str, float] = {}
    for atom in candidates:
        if atom.has_altloc():
            occupied[atom.altloc] = occupied.get(atom.altloc, 0.0) + atom.occ
    best = max(occupied, key=lambda name: occupied[name], default=None)
    atoms: dict[str, Any] = {}
    for atom in sorted(candidates, key=lambda atom: (atom.has_altloc() and atom.altloc != best, -atom.occ)):
        atoms.setdefault(atom.name, atom)
    return atoms


def _on_a_line(positions: list[list[float]]) -> bool:
    n, ca, c = torch.tensor(positions, dtype=torch.float64)
    return float(torch.linalg.vector_norm(torch.linalg.cross(n - ca, c - ca))) < 1e-3
