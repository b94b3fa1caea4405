"""Small PDB and mmCIF files, in the ways that programs write them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

LETTERS = "AGLSKEVD"
NAMES = ["ALA", "GLY", "LEU", "SER", "LYS", "GLU", "VAL", "ASP"]
_ATOMS = ("N", "CA", "C", "O")


def position(place: int, atom: str) -> tuple[float, float, float]:
    """A helix's backbone: bonded residues where places follow each other."""
    turn = math.radians(100) * place
    radius, angle, rise = {
        "N": (1.55, -0.48, -0.9),
        "CA": (2.28, 0.0, 0.0),
        "C": (1.68, 0.46, 1.1),
        "O": (2.0, 0.5, 2.3),
    }[atom]
    return radius * math.cos(turn + angle), radius * math.sin(turn + angle), 1.5 * place + rise


def pdb_lines(
    names: Sequence[str] = NAMES,
    chain: str = "A",
    *,
    start: int = 1,
    place: int = 0,
    shift: float = 0.0,
    segment: str = "",
    hetero: Sequence[int] = (),
    altloc: str = " ",
    occupancy: float = 1.0,
) -> list[str]:
    """The atoms of some residues, a line each."""
    lines = []
    for offset, name in enumerate(names):
        for atom in _ATOMS:
            x, y, z = position(place + offset, atom)
            record = "HETATM" if offset in hetero else "ATOM"
            lines.append(
                f"{record:<6}{1:>5}  {atom:<3}{altloc}{name:>3}{chain:>2}{start + offset:>4}    "
                f"{x + shift:8.3f}{y:8.3f}{z:8.3f}{occupancy:6.2f}{20:6.2f}      {segment:<4}{atom[0]:>2}"
            )
    return lines


def renumbered(lines: Sequence[str], field: Callable[[int], str]) -> list[str]:
    """The same atoms, with columns 23 to 26 from the number of the residue, from 0."""
    return [line[:22] + f"{field(place // 4):>4}" + line[26:] for place, line in enumerate(lines)]


CIF_COLUMNS = (
    "group_PDB", "id", "type_symbol", "label_atom_id", "label_alt_id", "label_comp_id", "label_asym_id",
    "label_entity_id", "label_seq_id", "pdbx_PDB_ins_code", "Cartn_x", "Cartn_y", "Cartn_z", "occupancy",
    "B_iso_or_equiv", "auth_seq_id", "auth_asym_id", "pdbx_PDB_model_num",
)  # fmt: skip


def cif_rows(label: str = "A", author: str = "A", *, start: int = 1, shift: float = 0.0) -> list[list[str]]:
    """The rows of eight residues, in the order of ``CIF_COLUMNS``."""
    return [
        ["ATOM", "1", atom[0], atom, ".", name, label, "1", str(place + 1), "?"]
        + [f"{value + shift:.3f}" for value in position(place, atom)]
        + ["1.0", "50.0", str(place + start), author, "1"]
        for place, name in enumerate(NAMES)
        for atom in _ATOMS
    ]


def cif_text(rows: Sequence[Sequence[str]], columns: Sequence[str] = CIF_COLUMNS, block: str = "x") -> str:
    """A file of one block, with these columns of the rows."""
    places = [CIF_COLUMNS.index(column) for column in columns]
    header = "".join(f"_atom_site.{column}\n" for column in columns)
    return f"data_{block}\nloop_\n{header}" + "".join(" ".join(row[place] for place in places) + "\n" for row in rows)
