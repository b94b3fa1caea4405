"""Residues as a structure file lists them, and the chains that they make up. Lengths are Angstrom."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from string import ascii_lowercase, ascii_uppercase, digits
from typing import NamedTuple

BACKBONE = ("N", "CA", "C")
"""The atoms that make a frame."""

_SEGMENT, _RESTART = "where the segment changes", "where numbering restarts"
_LONGEST_BOND = 2.0  # C to the next residue's N; 1.33 where a peptide is whole


class AtomRecord(NamedTuple):
    """A backbone atom as the file has it.

    Attributes:
        name: N, CA or C.
        altloc: Its alternative location; empty if it has one place only.
        position: Coordinates.
        occupancy: From 0 to 1.
        b_factor: Square Angstrom.
    """

    name: str
    altloc: str
    position: tuple[float, float, float]
    occupancy: float
    b_factor: float


@dataclass(slots=True)
class ResidueRecord:
    """A place in a chain, with the residue types that occupy it: one, unless alternative locations differ in type.

    Attributes:
        chain: The chain's name in the file; empty if it has none.
        segment: What tells molecules of one chain name apart: a PDB file's segment identifier, an mmCIF's
            ``label_asym_id``.
        number: The residue's number; None if the file gives none.
        insertion: The insertion code; empty if there is none.
        hetero: Whether it is listed as HETATM.
        types: The backbone atoms of each residue name.
        entity: An mmCIF's entity.
        label_number: An mmCIF's number in the entity's sequence.
        after_end: Whether a TER stands before it, and it belongs to what follows the chain's polymer.
    """

    chain: str
    segment: str
    number: int | None
    insertion: str
    hetero: bool
    types: dict[str, list[AtomRecord]] = field(default_factory=dict)
    entity: str = ""
    label_number: int | None = None
    after_end: bool = False

    @property
    def key(self) -> tuple[int | None, str]:
        """Number and insertion code."""
        return self.number, self.insertion

    def atom(self, name: str) -> AtomRecord | None:
        """The first backbone atom of a name."""
        return next((atom for atoms in self.types.values() for atom in atoms if atom.name == name), None)

    def places(self) -> set[tuple[str, str, str]]:
        """Residue name, atom name and alternative location of each backbone atom."""
        return {(name, atom.name, atom.altloc) for name, atoms in self.types.items() for atom in atoms}

    def begins_anew(self, name: str, atom: str, altloc: str) -> bool:
        """Whether an N of this name starts another residue: this one is whole and has that N."""
        atoms = {(own.name, own.altloc) for own in self.types.get(name, ())}
        return atom == "N" and (atom, altloc) in atoms and {own for own, _ in atoms} >= set(BACKBONE)


@dataclass(slots=True)
class ChainRecord:
    """A chain of a file: what stands under one name, up to where its polymer ends.

    Attributes:
        name: What it is called here; the name in the file unless several chains share that.
        original: The name in the file.
        segment: Its segment; empty if it has none.
        residues: In the file's order; residues of one place are one.
        closed: Whether a TER ends its polymer.
    """

    name: str
    original: str
    segment: str
    residues: list[ResidueRecord] = field(default_factory=list)
    closed: bool = False

    def answers_to(self, name: str) -> bool:
        """Whether a user who asks for this name means this chain, maybe among others."""
        return name.strip() in (self.name, self.original) or (not self.original and name.strip() == self.segment != "")


def chains_of(
    listed: Iterable[ResidueRecord],
    ends: set[int],
    is_amino_acid: Callable[[ResidueRecord], bool],
    *,
    segments_end_chains: bool = True,
    stated_lengths: Mapping[str, int] | None = None,
) -> tuple[list[ChainRecord], list[str]]:
    """Divides residues into chains, which end at TER, at a change of segment, and where numbering restarts.

    Numbering restarts where a number is lower than the one before, or was there already, and no peptide bond joins the
    two residues. Only amino acids begin a chain: ligands and water stay with the chain whose name they have.

    Args:
        listed: Residues in the file's order.
        ends: Places in that order after which there is a TER.
        is_amino_acid: Tells amino acids.
        segments_end_chains: Whether a change of segment ends a chain even where a peptide bond crosses it.
        stated_lengths: Residues that the file says each chain has. Where no more are listed, falling numbers are those
            of one chain, with a gap.

    Returns:
        The chains, in the order of their first residues, and a line for each name that several chains share.
    """
    residues = list(listed)
    amino = [is_amino_acid(residue) for residue in residues]
    following = _following(residues, amino)
    listed_of = Counter(residue.chain for residue, own in zip(residues, amino, strict=True) if own)
    one_chain = {name for name, count in (stated_lengths or {}).items() if listed_of[name] <= count}
    groups: dict[str, list[ChainRecord]] = {}
    last: dict[str, ResidueRecord] = {}
    known: dict[str, dict[tuple[int | None, str], ResidueRecord]] = {}
    shifts: dict[str, int] = {}
    reasons: dict[str, list[str]] = {}
    order: list[ChainRecord] = []
    ended: set[str] = set()

    def begin(name: str) -> None:
        chain = ChainRecord(name, name, "")
        groups.setdefault(name, []).append(chain)
        order.append(chain)
        known[name], shifts[name] = {}, 0
        last.pop(name, None)
        ended.discard(name)

    for place, residue in enumerate(residues):
        name = residue.chain
        if name not in groups:
            begin(name)
        raw = residue.number
        if amino[place]:
            before = last.get(name)
            if raw is not None:
                last_number = before.number if before is not None and before.number is not None else 0
                wrapped = last_number > 0 and last_number % 10000 == 9999 and raw == 0
                shifts[name] += 10000 if wrapped else 0  # four columns count to 9999, then from 0
                residue.number = raw + shifts[name]
            reason = before and _boundary(before, residue, known[name], name in ended, following.get(place))
            if reason == _SEGMENT and not segments_end_chains and before is not None and _bonded(before, residue):
                reason = ""
            if reason == _RESTART and name in one_chain:
                reason = ""
            if reason:
                begin(name)
                residue.number = raw
                reasons.setdefault(name, []).append(reason)
        residue.after_end = name in ended
        if amino[place] and not residue.after_end:
            last[name] = residue
            groups[name][-1].segment = groups[name][-1].segment or residue.segment
        twin = known[name].get(residue.key)
        if twin is not None and _same_place(twin, residue):
            for type_name, atoms in residue.types.items():
                twin.types.setdefault(type_name, []).extend(atoms)
        else:
            known[name][residue.key] = residue
            groups[name][-1].residues.append(residue)
        if place in ends and last.get(name) is not None:
            ended.add(name)
            groups[name][-1].closed = True
    return order, list(_name_apart(groups, reasons))


def _following(residues: list[ResidueRecord], amino: list[bool]) -> dict[int, ResidueRecord]:
    """For each amino acid, the next one of its chain's name."""
    following: dict[int, ResidueRecord] = {}
    latest: dict[str, ResidueRecord] = {}
    for place in reversed(range(len(residues))):
        if amino[place]:
            if residues[place].chain in latest:
                following[place] = latest[residues[place].chain]
            latest[residues[place].chain] = residues[place]
    return following


def _boundary(
    before: ResidueRecord,
    residue: ResidueRecord,
    known: dict[tuple[int | None, str], ResidueRecord],
    ended: bool,
    after: ResidueRecord | None,
) -> str:
    """Why a chain ends between two amino acids of one name; empty if it goes on."""
    joined = _bonded(before, residue)
    elsewhere = residue.segment != before.segment
    if residue.hetero and not joined and not (after is not None and _bonded(residue, after)):
        return ""  # an amino acid as a ligand
    if ended:
        return "at a TER"
    if elsewhere and (not joined or (residue.segment and before.segment)):
        return _SEGMENT
    twin = known.get(residue.key)
    if twin is not None and _same_place(twin, residue):
        return ""
    if residue.number is None or before.number is None or joined:
        return ""
    if residue.label_number is not None and before.label_number is not None and twin is None:
        return _RESTART if residue.label_number <= before.label_number else ""
    return _RESTART if residue.number < before.number or twin is not None else ""


def _bonded(first: ResidueRecord, second: ResidueRecord) -> bool:
    carbon, nitrogen = first.atom("C"), second.atom("N")
    return carbon is not None and nitrogen is not None and math.dist(carbon.position, nitrogen.position) < _LONGEST_BOND


def _same_place(first: ResidueRecord, second: ResidueRecord) -> bool:
    """Whether two residues of one number are parts of one: no atom is there twice, and other types are alternatives."""
    if first.places() & second.places():
        return False
    if set(first.types) & set(second.types):
        return True
    return all(atom.altloc for residue in (first, second) for atoms in residue.types.values() for atom in atoms)


def _name_apart(groups: dict[str, list[ChainRecord]], reasons: dict[str, list[str]]) -> Iterator[str]:
    """Gives chains of one name different names, and says so."""
    used = set(groups) | {chain.segment for chains in groups.values() for chain in chains}
    for original, chains in groups.items():
        if len(chains) == 1:
            continue
        segments = [chain.segment for chain in chains]
        if all(segments) and len(set(segments)) == len(segments) and not set(segments) & set(groups):
            names = segments
        elif original:
            names = list(_unused((f"{original}{number}" for number in _count()), used, len(chains)))
        else:
            letters = (*ascii_uppercase, *ascii_lowercase, *digits)
            names = list(_unused((*letters, *(f"chain{number}" for number in range(1, 10**4))), used, len(chains)))
        used.update(names)
        for chain, name in zip(chains, names, strict=True):
            chain.name = name
        called = f"chain {original}" if original else "the chain without a name"
        where = " and ".join(dict.fromkeys(reasons.get(original, ())))
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        yield f"{called} ends {where} and begins again: it is read as {len(chains)} chains, {shown}"


def _count() -> Iterator[int]:
    number = 0
    while True:
        number += 1
        yield number


def _unused(names: Iterable[str], used: set[str], count: int) -> Iterator[str]:
    for name in names:
        if count and name not in used:
            count -= 1
            yield name
        if not count:
            return
