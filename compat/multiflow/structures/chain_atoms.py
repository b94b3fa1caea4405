"""The backbone atoms of the proteins in a PDB or mmCIF file, as the file has them. Lengths are Angstrom.

What counts as a residue, and which of its atoms are taken, is decided here for all who read structures.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....errors import BadInput

ATOMS = ("N", "CA", "C")
"""The atoms that make a frame."""

_LARGEST = 1e6  # no column of a PDB file holds more
_ON_A_LINE = 1e-3  # square Angstrom: twice the area of the triangle of the three atoms


@dataclass(frozen=True, eq=False)
class ChainAtoms:
    """The amino acids of one chain, in the file's order.

    Attributes:
        name: The chain's name (``auth_asym_id`` of an mmCIF).
        letters: One-letter codes, X where unknown; modified residues have the code of what they come from.
        numbers: The file's residue numbers, without insertion codes.
        atoms: Positions of N, CA and C, shape ``[n, 3, 3]``; zero where there is no such atom.
        b_factors: Those of the CA atoms; zero where there is none, or no number.
        faults: For each residue without a frame, by its place in the chain, a line that says why.
    """

    name: str
    letters: str
    numbers: NDArray[np.int64]
    atoms: NDArray[np.float64]
    b_factors: NDArray[np.float32]
    faults: dict[int, str]

    @property
    def has_frame(self) -> NDArray[np.bool_]:
        """Whether a residue has all three atoms, and they do not lie on one line."""
        whole = np.ones(len(self.letters), dtype=bool)
        whole[list(self.faults)] = False
        return whole


@dataclass(frozen=True, eq=False)
class FileAtoms:
    """The first model of a file.

    Attributes:
        names: Names of all its chains, whatever they are made of.
        chains: Those that hold amino acids.
        resolution: Angstrom; None where the file states none.
    """

    names: tuple[str, ...]
    chains: tuple[ChainAtoms, ...]
    resolution: float | None


def read_atoms(path: Path, wanted: Collection[str] | None = None) -> FileAtoms:
    """Reads the backbone atoms of a PDB or mmCIF file, also gzipped; its content tells what it is.

    Of several models the first is read, of alternative locations the most occupied. Modified amino acids count as the
    one they come from (MSE as MET). Water, ligands and nucleic acids are passed over.

    Args:
        path: The file.
        wanted: Names of the chains to read; all by default.

    Raises:
        BadInput: No such file, no structure in it, or coordinates that are not finite or not of this world.
    """
    structure = _load(path)
    model = structure[0] if len(structure) else ()
    try:
        names = tuple(chain.name for chain in model)
        chains = [_chain_atoms(path, chain) for chain in model if wanted is None or chain.name in wanted]
    except UnicodeDecodeError as error:  # gemmi hands on names as they are
        raise BadInput(f"{path} cannot be read as PDB or mmCIF: a name in it is no text ({error.object!r})") from error
    return FileAtoms(
        names=names,
        chains=tuple(chain for chain in chains if chain is not None),
        resolution=structure.resolution if structure.resolution > 0 else None,
    )


def _load(path: Path) -> Any:
    import gemmi  # here, so that sampling without files needs no gemmi

    if not path.exists():
        raise BadInput(f"no such file: {path}")
    if not path.is_file():
        raise BadInput(f"{path} is no file")
    if not path.stat().st_size:
        raise BadInput(f"{path} is empty")
    try:
        structure = gemmi.read_structure(str(path), format=gemmi.CoorFormat.Detect)
    except (RuntimeError, ValueError, OSError) as error:  # UnicodeDecodeError is a ValueError
        why = " ".join(str(error).replace(str(path), path.name).split())  # some errors have lines of their own
        raise BadInput(f"{path} cannot be read as PDB or mmCIF: {why}") from error
    structure.setup_entities()
    return structure


def _chain_atoms(path: Path, chain: Any) -> ChainAtoms | None:
    residues = list(_amino_acids(chain))
    if not residues:
        return None
    positions, present, b_factors = [], [], []
    for residue, _ in residues:
        found = _backbone_atoms(residue)
        positions.append([found[name].pos.tolist() if name in found else (0.0, 0.0, 0.0) for name in ATOMS])
        present.append([name in found for name in ATOMS])
        b_factors.append(found["CA"].b_iso if "CA" in found else 0.0)
    labels = [f"{chain.name} {residue.seqid} {residue.name}" for residue, _ in residues]
    atoms, there = np.array(positions), np.array(present)
    faults = {
        int(place): f"{labels[place]}: no {', '.join(np.array(ATOMS)[~there[place]])}"
        for place in np.flatnonzero(~there.all(1))
    }

    whole = there.all(1)
    outside = whole & ~(np.abs(atoms) < _LARGEST).all((1, 2))  # true for NaN too
    if outside.any():
        what = "coordinates that are not finite numbers, or of a million Angstrom and more"
        raise BadInput(f"{path}: residue {labels[int(outside.argmax())]} has {what}")
    edges = atoms[:, (0, 2)] - atoms[:, 1:2]
    area = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=-1)
    for place in np.flatnonzero(whole & (area < _ON_A_LINE)):
        faults[int(place)] = f"{labels[place]}: N, CA and C lie on one line"

    numbers = [residue.seqid.num for residue, _ in residues]
    return ChainAtoms(
        name=chain.name,
        letters="".join(letter for _, letter in residues),
        numbers=np.array([place if number is None else number for place, number in enumerate(numbers)], dtype=np.int64),
        atoms=atoms,
        b_factors=np.nan_to_num(np.array(b_factors, dtype=np.float32), posinf=0.0, neginf=0.0),
        faults=dict(sorted(faults.items())),
    )


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
    first = {name: atom for name in ATOMS if (atom := residue.find_atom(name, "*")) is not None}
    if not any(atom.has_altloc() for atom in first.values()):
        return first
    candidates = [atom for atom in residue if atom.name in ATOMS]
    occupied: dict[str, float] = {}
    for atom in candidates:
        if atom.has_altloc():
            occupied[atom.altloc] = occupied.get(atom.altloc, 0.0) + atom.occ
    best = max(occupied, key=lambda name: occupied[name])
    atoms: dict[str, Any] = {}
    for atom in sorted(candidates, key=lambda atom: (atom.has_altloc() and atom.altloc != best, -atom.occ)):
        atoms.setdefault(atom.name, atom)
    return atoms
