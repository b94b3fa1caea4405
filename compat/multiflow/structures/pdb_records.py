"""Reads the residues of PDB files, in the ways that programs write them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....errors import BadInput
from .residue_names import is_known, letter_of_variant
from .residue_records import BACKBONE, AtomRecord, ResidueRecord

_LONG_SERIAL = re.compile(r"(?:ATOM  |HETATM)(\d{6,})", re.IGNORECASE)
_LONG_NUMBER = re.compile(r"-?\d{5,8}(?=\s|$)|-\d{4}(?=\s|$)")
_HEXADECIMAL = re.compile(r"[0-9][0-9a-fA-F]{3}")
_ID_AND_LINE = re.compile(r"[0-9][A-Z0-9]{3}\s*\d+$")  # columns 73 to 80 before 1996


@dataclass(slots=True)
class PdbRecords:
    """The first model of a PDB file.

    Attributes:
        residues: In the file's order.
        ends: Places of the residues after which there is a TER.
        header: The file without its atoms, as gemmi reads it.
        notes: What was left out, a line each.
        stated_lengths: Residues that SEQRES records give each chain.
    """

    residues: list[ResidueRecord]
    ends: set[int]
    header: Any
    notes: list[str]
    stated_lengths: dict[str, int]


def read_pdb(path: Path, text: str) -> PdbRecords:
    """Reads the first model that has atoms.

    Beyond the format: serial and residue numbers that are too long for their columns, hybrid-36 and hexadecimal ones,
    residue names of four letters, no element or charge, records in lower case, models of one number or without an end.

    Args:
        path: The file, for errors.
        text: Its content.

    Raises:
        BadInput: It has no atoms, or an atom of a backbone has no coordinates.
    """
    import gemmi

    lines = text.split("\n")
    atoms, notes = _first_model(lines)
    if not atoms:
        raise BadInput(
            f"{path} has no ATOM records: it holds no structure", "pass a PDB or mmCIF file with coordinates"
        )
    header = "\n".join(line for line in lines if line[:6].rstrip() in ("HEADER", "REMARK", "MODRES", "EXPDTA"))
    try:
        about = gemmi.read_pdb_string(header + "\nEND\n")
    except (RuntimeError, ValueError):  # a remark that is not as the format has it: it says nothing then
        about = gemmi.Structure()
    while len(about):
        del about[0]
    reader = _Reader(path, legacy=_has_ids(atoms), hexadecimal=_has_hexadecimal(atoms))
    for number, line in atoms:
        reader.add(number, line)
    return PdbRecords(reader.residues, reader.ends, about, notes, _stated_lengths(lines))


def _stated_lengths(lines: list[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in lines:
        if line.startswith("SEQRES") and line[13:17].strip().isdecimal():
            found[line[10:12].strip()] = int(line[13:17])
    return found


def _first_model(lines: list[str]) -> tuple[list[tuple[int, str]], list[str]]:
    """Numbers and text of the lines of the first model that has atoms, ATOM, HETATM and TER; and what to say of it."""
    atoms: list[tuple[int, str]] = []
    ended = over = False
    chains, joined, elsewhere = set[str](), set[str](), set[str]()
    for number, line in enumerate(lines, start=1):
        record = line[:6].upper().rstrip()
        if record in ("ATOM", "HETATM") or (record[:4] == "ATOM" and record[5:].isdecimal()):
            name = line[20:22].strip()
            # Files that were joined: after an END, other chains belong to the same structure.
            over = over or (ended and (name in chains or not name))
            if over:
                elsewhere.add(name)
                continue
            (joined if ended else chains).add(name)
            atoms.append((number, line))
        elif record == "TER" and not over:
            atoms.append((number, "TER"))
        elif chains and (record[:5] == "MODEL" or record == "ENDMDL"):
            over = True
        elif chains and record == "END":
            ended = True
    notes = []
    if joined:
        notes.append(f"it goes on after an END, with chain {', '.join(sorted(joined))}, which is read as well")
    if elsewhere - chains - joined:
        other = ", ".join(sorted(elsewhere - chains - joined))
        notes.append(f"of its models the first is read; chain {other} stands in another one only")
    return (atoms if chains else []), notes


def _has_ids(atoms: list[tuple[int, str]]) -> bool:
    """Whether columns 73 to 80 hold the entry's name and the line's number, as until 1996."""
    tails = [line[72:80].rstrip() for _, line in atoms if line != "TER"]
    return bool(tails) and all(_ID_AND_LINE.match(tail) for tail in tails) and len({tail[:4] for tail in tails}) == 1


def _has_hexadecimal(atoms: list[tuple[int, str]]) -> bool:
    """Whether residue numbers beyond 9999 are hexadecimal, as VMD writes them."""
    fields = (line[22:26] for _, line in atoms if line != "TER")
    return any(_HEXADECIMAL.fullmatch(field) is not None and not field.isdecimal() for field in fields)


class _Reader:
    """Collects residues from lines."""

    def __init__(self, path: Path, *, legacy: bool, hexadecimal: bool) -> None:
        self.residues: list[ResidueRecord] = []
        self.ends: set[int] = set()
        self._path, self._legacy, self._hexadecimal = path, legacy, hexadecimal
        self._open = False  # whether the next atom may belong to the last residue
        self._beyond = False  # whether number 9999 has been seen
        self._where = ("", "")

    def add(self, number: int, line: str) -> None:
        """Reads an ATOM, HETATM or TER line."""
        if line == "TER":
            if self.residues:
                self.ends.add(len(self.residues) - 1)
            self._open = False
            return
        if len(line.rstrip()) < 54:
            raise BadInput(
                f"{self._path}: line {number} ends before its coordinates do (column 54): {line.rstrip()[:60]!r}",
                "the file is cut short, or no PDB: copy it again, or write it as PDB or mmCIF",
            )
        where = (line[16:30], line[72:76])
        if where == self._where and self._open and line[12:16].strip().upper() not in BACKBONE:
            return  # more of the same residue
        self._where = where
        line = _in_columns(line)
        atom = line[12:16].strip().upper()
        altloc = line[16].strip()
        name, chain = line[17:20].strip().upper(), line[20:22].strip()
        for start in (17, 16):  # names of four letters, one column too far to the right or to the left
            four = line[start : start + 4].upper()
            if len(four.strip()) == 4 and letter_of_variant(four) and not (start == 16 and is_known(name)):
                name, chain, altloc = four, line[21].strip() if start == 17 else chain, altloc if start == 17 else ""
                break
        residue_number, insertion = self._number(line)
        segment = "" if self._legacy else line[72:76].strip()
        hetero = line[:6].upper() == "HETATM"
        record = self.residues[-1] if self._open and self.residues else None
        here = (chain, segment, residue_number, insertion)
        same = record is not None and (record.chain, record.segment, *record.key) == here
        if same and record is not None and name not in record.types:
            own = [atom_.altloc for atoms in record.types.values() for atom_ in atoms]
            same = bool(altloc) and all(own)
        if record is None or not same or record.begins_anew(name, atom, altloc):
            record = ResidueRecord(chain, segment, residue_number, insertion, hetero)
            self.residues.append(record)
            self._open = True
        atoms = record.types.setdefault(name, [])
        if atom in BACKBONE:
            position = self._position(number, line, f"{chain} {line[22:27].strip()} {name}".strip())
            atoms.append(AtomRecord(atom, altloc, position, _real(line[54:60], 1.0), _real(line[60:66], 0.0)))

    def _number(self, line: str) -> tuple[int | None, str]:
        """Residue number and insertion code."""
        long = _LONG_NUMBER.match(line[22:30])
        if long:
            return int(long[0]), ""
        text, insertion = line[22:26].strip(), line[26].strip()
        if not text:
            return None, insertion
        hexadecimal = self._hexadecimal and ((self._beyond and text != "9999") or not text.isdecimal())
        if hexadecimal and _HEXADECIMAL.fullmatch(text):
            return int(text, 16), insertion
        if re.fullmatch(r"[+-]?\d+", text):
            self._beyond = self._beyond or int(text) == 9999
            return int(text), insertion
        if re.fullmatch(r"[A-Z][A-Z0-9]{3}", text):  # hybrid-36
            return int(text, 36) - 10 * 36**3 + 10**4, insertion
        if re.fullmatch(r"[a-z][a-z0-9]{3}", text):
            return int(text, 36) + 16 * 36**3 + 10**4, insertion
        return None, insertion

    def _position(self, number: int, line: str, label: str) -> tuple[float, float, float]:
        fields = (line[30:38], line[38:46], line[46:54])
        try:
            x, y, z = (float(field) for field in fields)
        except ValueError:
            raise BadInput(
                f"{self._path}: residue {label} has no coordinates in columns 31 to 54 of line {number}: "
                f"{line[30:54].rstrip()!r}",
                "the file is cut short or its columns are shifted: write it anew as PDB, or as mmCIF",
            ) from None
        return x, y, z


def _in_columns(line: str) -> str:
    """A line of at least 80 columns, with what a serial number of more than five digits has shifted put back."""
    line = line.rstrip("\n").expandtabs()
    long = _LONG_SERIAL.match(line)
    if long:
        shift = len(long[1]) - 5
        # Not all programs shift the rest: the decimal points tell.
        if line[34:35] != "." or line[34 + shift : 35 + shift] == ".":
            line = line[:6] + line[6 + shift :]
    return line.ljust(80)


def _real(text: str, default: float) -> float:
    try:
        value = float(text)
    except ValueError:
        return default
    return value if math.isfinite(value) else default
