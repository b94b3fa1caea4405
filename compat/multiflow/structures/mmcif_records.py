"""Reads the residues of mmCIF files, in the ways that programs write them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....errors import BadInput
from .residue_records import BACKBONE, AtomRecord, ResidueRecord

_TABLES = {
    "_refln.": "reflections (structure factors)",
    "_chem_comp_atom.": "the definition of a chemical component",
    "_entity_poly_seq.": "sequences",
    "_ma_data.": "the data of a computed model",
}


@dataclass(slots=True)
class CifRecords:
    """The first model of an mmCIF file.

    Attributes:
        residues: In the file's order.
        header: The block without its atoms, as gemmi reads it.
        notes: What was left out, a line each.
    """

    residues: list[ResidueRecord]
    header: Any
    notes: list[str]


def read_mmcif(path: Path, text: str, *, json: bool = False) -> CifRecords:
    """Reads the first model of the first data block that has atoms.

    Args:
        path: The file, for errors.
        text: Its content.
        json: Whether it is mmJSON.

    Raises:
        BadInput: It is no CIF, has no atoms or no coordinates, or an atom of a backbone has none.
    """
    import gemmi

    try:
        document = gemmi.cif.read_mmjson_string(text) if json else _document(text)
        blocks = [block for block in document if block.find_mmcif_category("_atom_site.")]
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split()).replace("string:", "line ", 1)
        kind = "mmJSON" if json else "mmCIF"
        raise BadInput(f"{path} cannot be read as {kind}: {reason}", "copy or download the file again") from error
    if not blocks:
        raise _without_atoms(path, document)
    block = blocks[0]
    notes = []
    if len(blocks) > 1:
        names = ", ".join(repr(other.name) for other in blocks[:4]) + (" and more" if len(blocks) > 4 else "")
        notes.append(f"it holds {len(blocks)} structures (data blocks {names}): the first is read")
    residues, elsewhere = _residues(path, block)
    if elsewhere:
        other = ", ".join(sorted(elsewhere))
        notes.append(f"of its models the first is read; chain {other} stands in another one only")
    try:
        block.find_mmcif_category("_atom_site.").erase()
        header = gemmi.make_structure_from_block(block)
    except (RuntimeError, ValueError):
        header = gemmi.Structure()
    while len(header):
        del header[0]
    return CifRecords(residues, header, notes)


def _document(text: str) -> Any:
    import gemmi

    try:
        return gemmi.cif.read_string(text)
    except (RuntimeError, ValueError) as error:
        if "duplicate block name" not in str(error):
            raise
        return gemmi.cif.read_string(text, check_level=0)


def _without_atoms(path: Path, document: Any) -> BadInput:
    for block in document:
        if block.find_values("_atom_site_label") or block.find_values("_atom_site_fract_x"):
            return BadInput(f"{path} is a CIF of a small molecule: it has no proteins", "pass a PDB or mmCIF file")
    held = [called for block in document for start, called in _TABLES.items() if block.find_mmcif_category(start)]
    what = f"; it holds {held[0]}" if held else ""
    return BadInput(f"{path} has no _atom_site table: it holds no structure{what}", "download the entry's coordinates")


class _Row:
    """One row of ``_atom_site``: values by the columns' names, plain text, empty for ``.`` and ``?``."""

    def __init__(self, table: Any) -> None:
        self._places = {tag.split(".", 1)[1].lower(): place for place, tag in enumerate(table.tags)}

    def has(self, name: str) -> bool:
        """Whether the table has a column."""
        return name.lower() in self._places

    def value(self, row: Any, *names: str) -> str:
        """The first of some columns that has a value."""
        import gemmi

        for name in names:
            place = self._places.get(name.lower())
            if place is not None and row[place] not in ("?", "."):
                text: str = gemmi.cif.as_string(row[place])
                return text
        return ""


def _residues(path: Path, block: Any) -> tuple[list[ResidueRecord], set[str]]:
    """The first model's residues, and the chains that only other models have."""
    table = block.find_mmcif_category("_atom_site.")
    read = _Row(table)
    if not all(read.has(f"Cartn_{axis}") for axis in "xyz"):
        what = "fractional coordinates only" if read.has("fract_x") else "no coordinates (Cartn_x, Cartn_y, Cartn_z)"
        raise BadInput(f"{path}: its atoms have {what}", "write it as PDB or mmCIF with coordinates in Angstrom")
    for names in (("label_atom_id", "auth_atom_id"), ("label_comp_id", "auth_comp_id")):
        if not any(read.has(name) for name in names):
            raise BadInput(f"{path}: its _atom_site table has no column {names[0]}", "write it anew as mmCIF")
    residues: list[ResidueRecord] = []
    elsewhere: set[str] = set()
    first_model: str | None = None
    record: ResidueRecord | None = None
    for row in table:
        model = read.value(row, "pdbx_PDB_model_num")
        if first_model is None:
            first_model = model
        if model != first_model:
            elsewhere.add(read.value(row, "auth_asym_id", "label_asym_id").strip())
            continue
        atom = read.value(row, "label_atom_id", "auth_atom_id").upper()
        name = read.value(row, "label_comp_id", "auth_comp_id").upper()
        altloc = read.value(row, "label_alt_id")
        chain = read.value(row, "auth_asym_id", "label_asym_id").strip()
        segment = read.value(row, "label_asym_id").strip()
        number = _whole(read.value(row, "auth_seq_id", "label_seq_id"))
        label_number = _whole(read.value(row, "label_seq_id"))
        if number is None:
            number = label_number
        insertion = read.value(row, "pdbx_PDB_ins_code")
        here = (chain, segment, number, insertion, label_number)
        same = record is not None and (record.chain, record.segment, *record.key, record.label_number) == here
        if same and record is not None and name not in record.types:
            same = bool(altloc) and all(own.altloc for atoms in record.types.values() for own in atoms)
        if record is None or not same or record.begins_anew(name, atom, altloc):
            hetero = read.value(row, "group_PDB").upper() == "HETATM"
            entity = read.value(row, "label_entity_id")
            record = ResidueRecord(chain, segment, number, insertion, hetero, {}, entity, label_number)
            residues.append(record)
        atoms = record.types.setdefault(name, [])
        if atom in BACKBONE:
            fields = [read.value(row, f"Cartn_{axis}") for axis in "xyz"]
            label = f"{chain} {number if number is not None else '?'}{insertion} {name}"
            position = _position(path, fields, label)
            occupancy = _real(read.value(row, "occupancy"), 1.0)
            atoms.append(AtomRecord(atom, altloc, position, occupancy, _real(read.value(row, "B_iso_or_equiv"), 0.0)))
    return residues, elsewhere - {residue.chain for residue in residues}


def _position(path: Path, fields: list[str], label: str) -> tuple[float, float, float]:
    try:
        x, y, z = (float(field.split("(")[0]) for field in fields)  # a standard uncertainty follows in brackets
    except ValueError:
        raise BadInput(
            f"{path}: residue {label} has coordinates that are no numbers: {' '.join(fields)!r}",
            "write the file anew, or leave the residue out",
        ) from None
    return x, y, z


def _whole(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _real(text: str, default: float) -> float:
    try:
        return float(text.split("(")[0])
    except ValueError:
        return default
