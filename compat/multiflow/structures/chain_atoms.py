"""The backbone atoms of the proteins in a PDB or mmCIF file, as the file has them. Lengths are Angstrom.

What counts as a residue, and which of its atoms are taken, is decided here for all who read structures.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....errors import BadInput
from .mmcif_records import read_mmcif
from .pdb_records import read_pdb
from .residue_names import CAPS, is_known, letter_of
from .residue_records import BACKBONE as ATOMS
from .residue_records import AtomRecord, ChainRecord, ResidueRecord, chains_of
from .structure_bytes import Format, read_text

_LARGEST = 1e6  # no column of a PDB file holds more
_ON_A_LINE = 1e-3  # square Angstrom: twice the area of the triangle of the three atoms


@dataclass(frozen=True, eq=False)
class ChainAtoms:
    """The amino acids of one chain, in the file's order.

    Attributes:
        name: The chain's name (``auth_asym_id`` of an mmCIF).
        letters: One-letter codes, X where unknown; modified residues have the code of what they come from.
        numbers: The file's residue numbers, without insertion codes.
        insertions: Their insertion codes, empty where there is none.
        atoms: Positions of N, CA and C, shape ``[n, 3, 3]``; zero where there is no such atom.
        b_factors: Those of the CA atoms; zero where there is none, or no number.
        faults: For each residue without a frame, by its place in the chain, a line that says why.
    """

    name: str
    letters: str
    numbers: NDArray[np.int64]
    insertions: tuple[str, ...]
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
        answered: Those of the names asked for that are a chain's.
        chains: Those that hold amino acids.
        resolution: Angstrom; None where the file states none.
        notes: What the file leaves open, and how it was read: a line each.
    """

    names: tuple[str, ...]
    answered: frozenset[str]
    chains: tuple[ChainAtoms, ...]
    resolution: float | None
    notes: tuple[str, ...]


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
    text, form = read_text(path)
    parts, header, notes = _records(path, text, form)
    parents = {modified.res_id.name: modified.parent_comp_id for modified in header.mod_residues}
    _model(header, parts)
    names = tuple(part.name for part in parts)
    chains = [
        _chain_atoms(path, part, chain, parents)
        for part, chain in zip(parts, header[0], strict=True)
        if wanted is None or any(part.answers_to(name) for name in wanted)
    ]
    return FileAtoms(
        names=names,
        answered=frozenset(name for name in wanted or () if any(part.answers_to(name) for part in parts)),
        chains=tuple(chain for chain in chains if chain is not None),
        resolution=header.resolution if header.resolution > 0 else None,
        notes=tuple(notes),
    )


def _records(path: Path, text: str, form: Format) -> tuple[list[ChainRecord], Any, list[str]]:
    """The chains, the rest of the file as gemmi reads it, and what is to be said of them."""
    if form == "pdb":
        pdb = read_pdb(path, text)
        residues, ends, header, notes, stated = pdb.residues, pdb.ends, pdb.header, pdb.notes, pdb.stated_lengths
    else:
        cif = read_mmcif(path, text, json=form == "mmjson")
        residues, ends, header, notes, stated = cif.residues, set(), cif.header, cif.notes, {}
    for residue in residues:
        if not residue.chain.isascii() or not all(name.isascii() for name in residue.types):
            name = next(name for name in (residue.chain, *residue.types) if not name.isascii())
            raise BadInput(f"{path} cannot be read: a name in it is no text ({name!r})", "write the file anew")
    parents = {modified.res_id.name: modified.parent_comp_id for modified in header.mod_residues}
    parts, shared = chains_of(
        residues,
        ends,
        lambda residue: _may_be_amino_acid(residue, parents),
        segments_end_chains=form == "pdb",
        stated_lengths=stated,
    )
    return parts, header, [*notes, *shared]


def _may_be_amino_acid(residue: ResidueRecord, parents: dict[str, str]) -> bool:
    return any(
        name not in CAPS
        and (letter_of(name, parents) is not None or (not is_known(name) and {atom.name for atom in atoms} >= {"CA"}))
        for name, atoms in residue.types.items()
    )


def _model(structure: Any, parts: Sequence[ChainRecord]) -> None:
    """Adds a model of the backbone to a file's header, and lets gemmi tell polymers, ligands and water.

    Residues are numbered by their places in the chain, each type of a place that has several for itself.
    """
    import gemmi

    kinds = {entity.name: entity.entity_type for entity in structure.entities}
    model = gemmi.Model(1)
    for part in parts:
        chain = gemmi.Chain("x")
        for place, record in enumerate(part.residues):
            for name, atoms in record.types.items():
                residue = gemmi.Residue()
                residue.name = name
                residue.seqid = gemmi.SeqId(place, " ")
                residue.het_flag = "H" if record.hetero else "A"
                residue.subchain = record.segment if record.entity else ""
                residue.label_seq = record.label_number
                if record.entity:
                    residue.entity_id = record.entity
                    residue.entity_type = kinds.get(record.entity, gemmi.EntityType.Unknown)
                elif record.after_end:
                    is_water = gemmi.find_tabulated_residue(name).is_water()
                    residue.entity_type = gemmi.EntityType.Water if is_water else gemmi.EntityType.NonPolymer
                elif part.closed:
                    residue.entity_type = gemmi.EntityType.Polymer
                for own in atoms:
                    residue.add_atom(_atom(own))
                chain.add_residue(residue)
        model.add_chain(chain)
    structure.add_model(model)
    structure.setup_entities()


def _atom(record: AtomRecord) -> Any:
    import gemmi

    atom = gemmi.Atom()
    atom.name = record.name
    atom.altloc = record.altloc[:1] or "\0"
    atom.pos = gemmi.Position(*record.position)
    atom.occ, atom.b_iso = record.occupancy, record.b_factor
    atom.element = gemmi.Element("N" if record.name == "N" else "C")
    return atom


def _chain_atoms(path: Path, part: ChainRecord, chain: Any, parents: dict[str, str]) -> ChainAtoms | None:
    residues = list(_amino_acids(chain, parents))
    if not residues:
        return None
    positions, present, b_factors = [], [], []
    for residue, _ in residues:
        found = _backbone_atoms(residue)
        positions.append([found[name].pos.tolist() if name in found else (0.0, 0.0, 0.0) for name in ATOMS])
        present.append([name in found for name in ATOMS])
        b_factors.append(found["CA"].b_iso if "CA" in found else 0.0)
    records = [part.residues[residue.seqid.num] for residue, _ in residues]
    labels = [
        f"{part.name} {'?' if record.number is None else record.number}{record.insertion} {residue.name}".lstrip()
        for record, (residue, _) in zip(records, residues, strict=True)
    ]
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

    numbers = [record.number for record in records]
    return ChainAtoms(
        name=part.name,
        letters="".join(letter for _, letter in residues),
        numbers=np.array([place if number is None else number for place, number in enumerate(numbers)], dtype=np.int64),
        insertions=tuple(record.insertion for record in records),
        atoms=atoms,
        b_factors=np.nan_to_num(np.array(b_factors, dtype=np.float32), posinf=0.0, neginf=0.0),
        faults=dict(sorted(faults.items())),
    )


def _amino_acids(chain: Any, parents: dict[str, str]) -> Iterator[tuple[Any, str]]:
    """Residues of the chain's protein, and their one-letter codes (X where unknown)."""
    for _, types in groupby(chain, key=lambda residue: residue.seqid.num):
        candidates = [(residue, letter) for residue in types if (letter := _letter(residue, parents)) is not None]
        if candidates:
            yield max(candidates, key=lambda candidate: _occupied(candidate[0]))


def _letter(residue: Any, parents: dict[str, str]) -> str | None:
    """The one-letter code of an amino acid in a polymer; None for everything else."""
    import gemmi

    in_polymer = residue.entity_type == gemmi.EntityType.Polymer
    if residue.name in CAPS or (residue.het_flag == "H" and not in_polymer):
        return None  # the latter is a ligand, even if it is an amino acid
    letter = letter_of(residue.name, parents)
    if letter is None and not is_known(residue.name) and in_polymer and residue.find_atom("CA", "*"):
        return "X"  # no table knows it: it is taken if it stands in a polymer and has a CA
    return letter


def _occupied(residue: Any) -> tuple[bool, float]:
    """By what one of several residue types in a place is taken: a whole backbone, then the mean occupancy."""
    atoms = _backbone_atoms(residue)
    mean = sum(atom.occ for atom in atoms.values()) / len(atoms) if atoms else 0.0
    return len(atoms) == len(ATOMS), mean


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
