"""Reads the backbones of PDB and mmCIF files. Lengths are Angstrom."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ....errors import BadInput
from .backbone import frames_from_atoms
from .chain_atoms import read_atoms
from .residue_types import sequence_from_types, types_from_sequence
from .writing import ResidueLabels, write_fasta, write_mmcif, write_pdb

__all__ = ["Backbone", "read_structure", "write_fasta", "write_mmcif", "write_pdb"]


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
        numbers: The file's residue numbers, as they stand there.
        insertions: The file's insertion codes, empty where there is none.
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
    numbers: Int64[Tensor, " n"]
    insertions: tuple[str, ...]

    @property
    def num_res(self) -> int:
        """Number of residues."""
        return len(self.aatypes)

    @property
    def sequence(self) -> str:
        """One-letter codes, X where the type is unknown."""
        return sequence_from_types(self.aatypes.tolist())

    @property
    def labels(self) -> ResidueLabels:
        """Chains and numbers of the residues, for the files that are written of them."""
        return ResidueLabels(self.chains, self.chain_index, self.numbers, self.insertions)


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
            not finite or of a million Angstrom and more.
    """
    path = Path(path)
    wanted = None if chain is None else ([chain] if isinstance(chain, str) else list(chain))
    file = read_atoms(path, wanted)
    for name in wanted or ():
        if name not in file.answered:
            named = ", ".join(own or "one without a name" for own in file.names)
            raise BadInput(f"{path} has no chain {name!r}: it has {named}", "pass one of these to --chain")
    for note in file.notes:
        warnings.warn(f"{path}: {note}", stacklevel=2)

    skipped = [fault for part in file.chains for fault in part.faults.values()]
    parts = [(part, part.has_frame) for part in file.chains if part.has_frame.any()]
    if not parts:
        where = f" in chain {', '.join(wanted)}" if wanted else ""
        left_out = f" ({len(skipped)} left out, the first: {skipped[0]})" if skipped else ""
        raise BadInput(
            f"{path} holds no amino acid with the atoms N, CA and C{where}{left_out}",
            "pass a protein with its backbone: a trace of CA atoms, a ligand or a nucleic acid has none",
        )
    atoms = np.concatenate([part.atoms[whole] for part, whole in parts])
    letters = "".join(letter for part, whole in parts for letter, kept in zip(part.letters, whole, strict=True) if kept)
    numbers = [part.numbers[whole] for part, whole in parts]
    if skipped:
        total = len(atoms) + len(skipped)
        warnings.warn(
            f"{path}: {len(skipped)} of {total} residues have no backbone frame and were left out, "
            f"the first: {skipped[0]}",
            stacklevel=2,
        )

    # In double precision until centred: files put proteins hundreds of Angstrom from the origin.
    n, ca, c = torch.from_numpy(atoms).unbind(1)
    rotmats, trans = frames_from_atoms(n, ca, c)
    if center:
        trans = trans - trans.mean(dim=0)
    return Backbone(
        name="_".join([path.name.split(".")[0] or path.name, *(wanted or ())]),
        trans=trans.float(),
        rotmats=rotmats.float(),
        aatypes=torch.tensor(types_from_sequence(letters)),
        chain_index=torch.cat([torch.full((len(own),), place) for place, own in enumerate(numbers, start=1)]),
        residue_index=torch.cat([torch.from_numpy(own - own.min() + 1) for own in numbers]),
        res_mask=torch.ones(len(atoms), dtype=torch.bool),
        chains=tuple(part.name for part, _ in parts),
        skipped=tuple(skipped),
        numbers=torch.cat([torch.from_numpy(own) for own in numbers]),
        insertions=tuple(
            code for part, whole in parts for code, kept in zip(part.insertions, whole, strict=True) if kept
        ),
    )
