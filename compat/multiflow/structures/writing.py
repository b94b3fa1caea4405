"""Writes backbones as PDB and mmCIF files and sequences as FASTA. Lengths are Angstrom."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ...files.atomic import write_whole
from .backbone import ATOM37_BACKBONE
from .residue_types import NAMES

_CHAIN_NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


@dataclass(frozen=True, eq=False)
class ResidueLabels:
    """Chains and numbers of residues, as files state them.

    Attributes:
        chains: Names of the chains, in order.
        chain_index: Number of each residue's chain among them; the lowest is the first of them. Never decreases.
        numbers: The residues' numbers.
        insertions: Their insertion codes, empty where there is none.
    """

    chains: tuple[str, ...]
    chain_index: Int[Tensor, " n"]
    numbers: Int[Tensor, " n"]
    insertions: tuple[str, ...]

    def with_chains(self, chains: Sequence[str]) -> ResidueLabels:
        """The same with other names of the chains."""
        return replace(self, chains=tuple(chains))

    def of_chains(self, sequence: str) -> dict[str, str]:
        """The part of a sequence that each chain has."""
        numbers = (self.chain_index - self.chain_index.min()).tolist()
        parts: dict[str, str] = dict.fromkeys(self.chains, "")
        for number, letter in zip(numbers, sequence, strict=True):
            parts[self.chains[number]] += letter
        return parts


def write_pdb(
    path: str | os.PathLike[str],
    atom37: Float[Tensor, "*t n 37 3"],
    aatypes: Shaped[Tensor, "*t n"],
    *,
    b_factors: Float[Tensor, " n"] | None = None,
    chain_index: Int[Tensor, " n"] | None = None,
    residue_index: Int[Tensor, " n"] | None = None,
    labels: ResidueLabels | None = None,
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
        labels: Chains and numbers of the residues, in place of the last two. Names of chains that are no single letter
            or digit become free letters.

    Returns:
        The path.

    Raises:
        ValueError: Shapes that do not fit, unknown types, more than 62 chains, or coordinates that are not finite or
            too large for the format's columns.
    """
    import gemmi

    names = None if labels is None else labels.with_chains(pdb_chain_names(labels.chains))
    structure = _structure(path, atom37, aatypes, b_factors, chain_index, residue_index, names)
    options = gemmi.PdbWriteOptions()
    options.cryst1_record = False
    return write_whole(path, structure.make_pdb_string(options))


def write_mmcif(
    path: str | os.PathLike[str],
    atom37: Float[Tensor, "*t n 37 3"],
    aatypes: Shaped[Tensor, "*t n"],
    *,
    b_factors: Float[Tensor, " n"] | None = None,
    labels: ResidueLabels | None = None,
) -> Path:
    """Writes what `write_pdb` writes as mmCIF, which has room for chains' names of any length.

    Args:
        path: The file. It is written aside and renamed.
        atom37: See `write_pdb`.
        aatypes: See `write_pdb`.
        b_factors: See `write_pdb`.
        labels: Chains and numbers of the residues; counted from 0 in chain A by default.

    Returns:
        The path.

    Raises:
        ValueError: As for `write_pdb`.
    """
    structure = _structure(path, atom37, aatypes, b_factors, None, None, labels)
    structure.name = Path(path).name.split(".")[0]
    for model in structure:
        for chain in model:
            for number, residue in enumerate(chain, start=1):
                residue.subchain, residue.label_seq = chain.name, number
    structure.setup_entities()
    return write_whole(path, structure.make_mmcif_document().as_string())


def pdb_chain_names(chains: Sequence[str]) -> tuple[str, ...]:
    """Names of one character for chains: their own where they are such, free letters for the others.

    Raises:
        ValueError: There are more than 62 chains.
    """
    if len(chains) > len(_CHAIN_NAMES):
        raise ValueError(f"{len(chains)} chains; a PDB file names at most {len(_CHAIN_NAMES)}")
    own = [name if len(name) == 1 and name in _CHAIN_NAMES else None for name in chains]
    free = iter([letter for letter in _CHAIN_NAMES if letter not in own])
    return tuple(name if name is not None else next(free) for name in own)


def _structure(
    path: str | os.PathLike[str],
    atom37: Tensor,
    aatypes: Tensor,
    b_factors: Tensor | None,
    chain_index: Tensor | None,
    residue_index: Tensor | None,
    labels: ResidueLabels | None,
) -> Any:
    """The file's content as gemmi's structure, checked."""
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
    model = _model(num_res, b_factors, chain_index, residue_index, labels)
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
    return structure


def _model(
    num_res: int,
    b_factors: Tensor | None,
    chain_index: Tensor | None,
    residue_index: Tensor | None,
    labels: ResidueLabels | None,
) -> Any:
    """A model whose atoms stand nowhere yet."""
    import gemmi

    temperatures = [0.0] * num_res if b_factors is None else b_factors.tolist()
    names: Sequence[str] = _CHAIN_NAMES
    insertions: Sequence[str] = ("",) * num_res
    if labels is not None:
        names, insertions = labels.chains, labels.insertions
        chain_index, residue_index = labels.chain_index, labels.numbers
    chain_numbers = [0] * num_res if chain_index is None else (chain_index - chain_index.min()).tolist()
    numbers = list(range(num_res)) if residue_index is None else residue_index.tolist()
    if not len(chain_numbers) == len(numbers) == len(insertions) == num_res:
        raise ValueError(f"labels of {len(numbers)} residues for {num_res}")
    if max(chain_numbers) >= len(names):
        raise ValueError(f"chain numbers span {max(chain_numbers) + 1}, a PDB file names at most {len(names)}")
    if chain_numbers != sorted(chain_numbers):
        raise ValueError("chain_index must not decrease: the residues of a chain stand together in a PDB file")
    model = gemmi.Model(1)
    before = None
    for position in range(num_res):
        if chain_numbers[position] != before:
            before = chain_numbers[position]
            model.add_chain(gemmi.Chain(names[before]))
        residue = gemmi.Residue()
        residue.seqid = gemmi.SeqId(int(numbers[position]), insertions[position] or " ")
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
