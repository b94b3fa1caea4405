"""Residue names of force fields, for the amino acids that they are protonation states or terminal forms of."""

from __future__ import annotations

from typing import Any

_VARIANTS = {
    # Amber, CHARMM, GROMACS (OPLS, GROMOS), Desmond, AutoDock and constant-pH names.
    "A": "ALAD",
    "R": "ARN AR0 RN1 ARGN ARGP",
    "D": "ASH ASPH ASPP ASPM AS4 AS5 AP1 ASPN",
    "C": "CYX CYM CYZ CYD CYT CYH CYP CY1 CY2 CYSH CYSP CYSM CYS1 CYS2 CYSX CYSD CYS-",
    "E": "GLH GLUH GLUP GLUM GL4 GL5 GU4 GLUN",
    "H": "HID HIE HIP HSD HSE HSP HSC HIH HIZ HIN HDD HDE HDP HS2 HISA HISB HISC HISD HISE HISH HISP HIS1 HIS2 HIS+",
    "K": "LYN LYP LSN LYH LYSH LYSN LYSP LYS1 LYS+",
    "Y": "TYM TYO TYRM TYRU TYR- TYRN",
    "S": "S1P S2P SP1 SP2 SEPM SERD",
    "T": "T1P T2P TP1 THP1",
    "W": "TRPU TRPP",
}  # fmt: skip
_PARENTS = {name: letter for letter, names in _VARIANTS.items() for name in names.split()}
_PARENTS |= {"Y1P": "Y", "Y2P": "Y", "H1D": "H", "H2D": "H", "H1E": "H", "H2E": "H"}  # Amber's phosphates
_PARENTS |= {"NVA": "V", "IYR": "Y", "HLU": "L", "4HP": "P"}

#: Amino acids of the genetic code that Multiflow has no type for, as the ones that they differ from in one atom or
#: side group: selenium for sulfur (SEC), an acylated lysine (PYL).
_RARE = {"SEC": "C", "PYL": "K"}

_STANDARD = {
    "ALA": "A", "ARG": "R", "ASN": "N", "ASP": "D", "CYS": "C", "GLN": "Q", "GLU": "E", "GLY": "G", "HIS": "H",
    "ILE": "I", "LEU": "L", "LYS": "K", "MET": "M", "PHE": "F", "PRO": "P", "SER": "S", "THR": "T", "TRP": "W",
    "TYR": "Y", "VAL": "V",
}  # fmt: skip

#: Groups that close a chain's ends in force fields: part of the polymer, no residues.
CAPS = frozenset("ACE NME NMA NH2 NHE FOR NAC CT3".split())


def letter_of_variant(name: str) -> str | None:
    """One-letter code of a name that a force field gives an amino acid, also at a terminus; None for other names.

    A leading N or C of a name of four letters is Amber's and GROMACS's mark of a chain's end (NALA, CHIE, NCYX).

    Args:
        name: The residue's name, three or four letters.
    """
    letter = _PARENTS.get(name) or _RARE.get(name)
    if letter is None and len(name) == 4 and name[0] in "NC":
        letter = _STANDARD.get(name[1:]) or _PARENTS.get(name[1:])
    return letter


def letter_of(name: str, parents: dict[str, str]) -> str | None:
    """One-letter code of an amino acid, X where its type is unknown; None for what is none or in no table.

    Args:
        name: The residue's name.
        parents: What the file itself says that modified residues come from.
    """
    import gemmi

    letter = letter_of_variant(name)
    if letter is not None:
        return letter
    info: Any = gemmi.find_tabulated_residue(name)
    if info.found():
        code = info.one_letter_code.upper()
        if info.is_amino_acid() and code not in _STANDARD.values() and name in parents:
            code = _STANDARD.get(parents[name], "X")
        return code if info.is_amino_acid() else None
    return _STANDARD.get(parents.get(name, ""))


def is_known(name: str) -> bool:
    """Whether a table says what a residue of this name is, amino acid or not."""
    import gemmi

    return letter_of_variant(name) is not None or bool(gemmi.find_tabulated_residue(name).found())
