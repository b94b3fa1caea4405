"""Multiflow's residue types: the twenty amino acids in AlphaFold's order, then one token for mask or unknown."""

from __future__ import annotations

from collections.abc import Iterable

LETTERS = "ARNDCQEGHILKMFPSTWYV"
"""One letter for each of the types 0 to 19."""

NAMES = (
    "ALA", "ARG", "ASN", "ASP", "CYS", "GLN", "GLU", "GLY", "HIS", "ILE",
    "LEU", "LYS", "MET", "PHE", "PRO", "SER", "THR", "TRP", "TYR", "VAL", "UNK",
)  # fmt: skip
"""PDB residue names of the types 0 to 20."""

MASK = 20
"""The type of a masked residue while sampling, and of an unknown one in a file."""

_INDEX = {letter: index for index, letter in enumerate(LETTERS)}


def sequence_from_types(types: Iterable[int]) -> str:
    """Residue types as one-letter codes, ``X`` for masked or unknown ones.

    Args:
        types: Integers from 0 to 20.
    """
    return "".join((LETTERS + "X")[int(index)] for index in types)


def types_from_sequence(sequence: str) -> list[int]:
    """One-letter codes as residue types; every letter that is not one of the twenty becomes ``MASK``."""
    return [_INDEX.get(letter.upper(), MASK) for letter in sequence]
