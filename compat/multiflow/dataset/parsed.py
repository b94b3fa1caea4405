"""What training needs of one structure file, and how it is kept on disk. Lengths are Angstrom."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ....errors import BadInput
from ...files.atomic import write_whole
from ..structures.backbone import frames_from_atoms
from ..structures.chain_atoms import ChainAtoms, read_atoms
from ..structures.residue_types import MASK, types_from_sequence

#: Part of every key of the cache: raised whenever what is kept of a file, or how it is read, changes.
PARSER_VERSION = 3


@dataclass(frozen=True, eq=False)
class ParsedChain:
    """A protein chain from its first to its last residue with a known type and a frame.

    Attributes:
        name: The chain's name in the file.
        trans: Positions of CA as the file has them; zero without a frame.
        rotmats: Rotation matrices; the identity without a frame.
        res_mask: Whether the residue has a frame.
        aatypes: Residue types, 20 where unknown.
        res_idx: The file's residue numbers, counted from 1 at the lowest.
        b_factors: Those of CA; zero where there is none.
    """

    name: str
    trans: NDArray[np.float64]
    rotmats: NDArray[np.float32]
    res_mask: NDArray[np.bool_]
    aatypes: NDArray[np.int8]
    res_idx: NDArray[np.int64]
    b_factors: NDArray[np.float32]

    @property
    def num_res(self) -> int:
        """Number of residues, with those that have no frame."""
        return len(self.aatypes)


_ARRAYS = ("trans", "rotmats", "res_mask", "aatypes", "res_idx", "b_factors")


@dataclass(frozen=True, eq=False)
class ParsedFile:
    """The protein chains of a file.

    Attributes:
        chains: In the file's order; none where no chain has a residue of known type with a frame.
        resolution: Angstrom; None where the file states none.
        unusable: A line for each chain of amino acids that was left out.
        notes: What the file leaves open, and how it was read: a line each.
    """

    chains: tuple[ParsedChain, ...]
    resolution: float | None
    unusable: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def parse(path: Path) -> ParsedFile:
    """Reads a PDB or mmCIF file.

    As Multiflow's own processing, it cuts residues of unknown type off a chain's ends. Unlike it, residues without N,
    CA or C are cut off too, or have no frame where they stand inside; and modified residues have the type of what they
    come from.

    Raises:
        BadInput: It is no structure, or its coordinates are not finite.
    """
    file = read_atoms(path)
    chains, unusable = [], []
    for part in file.chains:
        chain = _parse_chain(part)
        if chain is None:
            reason = next(iter(part.faults.values()), "")
            of_them = f"; the first: {reason}" if reason else ""
            unusable.append(
                f"chain {part.name}: none of its {len(part.letters)} residues has a known type and N, CA and C{of_them}"
            )
        else:
            chains.append(chain)
    return ParsedFile(tuple(chains), file.resolution, tuple(unusable), file.notes)


def _parse_chain(part: ChainAtoms) -> ParsedChain | None:
    aatypes = np.array(types_from_sequence(part.letters), dtype=np.int8)
    modelled = np.flatnonzero(part.has_frame & (aatypes != MASK))
    if not len(modelled):
        return None
    span = slice(int(modelled[0]), int(modelled[-1]) + 1)
    res_mask = part.has_frame[span]
    # In double precision: files put proteins hundreds of Angstrom from the origin, and centring comes later.
    rotmats, trans = (part_.numpy() for part_ in frames_from_atoms(*torch.from_numpy(part.atoms[span]).unbind(1)))
    numbers = part.numbers[span]
    return ParsedChain(
        name=part.name,
        trans=np.where(res_mask[:, None], trans, 0.0),
        rotmats=np.where(res_mask[:, None, None], rotmats, np.eye(3)).astype(np.float32),
        res_mask=res_mask,
        aatypes=aatypes[span],
        res_idx=numbers - numbers.min() + 1,
        b_factors=part.b_factors[span],
    )


class StructureCache:
    """Reads files, and keeps what was read: each in a safetensors file of its own, there whole or not at all.

    An entry belongs to a file's path, size and time of change, and to the version of what reads it. Any number of
    processes may share a folder. An entry that cannot be read is made again; a folder that cannot be written to is
    given up, and ``problem`` says why.

    Args:
        folder: Where entries are kept; None keeps none.

    Attributes:
        problem: Why nothing is kept any more; None as long as all is well.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.problem: str | None = None

    def read(self, path: Path) -> ParsedFile:
        """What the file holds, from the cache if it is there.

        Raises:
            BadInput: It cannot be read as a structure.
        """
        if self.folder is None:
            return parse(path)
        try:
            entry = self._entry(path)
        except OSError as error:
            raise BadInput(f"{path} cannot be read: {error.strerror or error}") from error
        kept = _load(entry)
        if kept is not None:
            return kept
        parsed = parse(path)
        if self.problem is None:
            try:
                entry.parent.mkdir(parents=True, exist_ok=True)
                write_whole(entry, _to_bytes(parsed))
            except OSError as error:
                self.problem = f"nothing is kept in {self.folder}: {error.strerror or error}"
        return parsed

    def has(self, path: Path) -> bool:
        """Whether there is an entry for the file; it may still turn out to be damaged."""
        try:
            return self.folder is not None and self._entry(path).exists()
        except OSError:
            return False

    def _entry(self, path: Path) -> Path:
        assert self.folder is not None
        state = path.stat()
        parts = (path.resolve(), state.st_size, state.st_mtime_ns, PARSER_VERSION, _gemmi())
        key = hashlib.sha256("\n".join(map(str, parts)).encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / key[:2] / f"{key[2:42]}.safetensors"


@lru_cache(maxsize=1)
def _gemmi() -> str:
    return importlib.metadata.version("gemmi")


def _to_bytes(parsed: ParsedFile) -> bytes:
    arrays = {}
    for name in _ARRAYS:
        values = [getattr(chain, name) for chain in parsed.chains]
        arrays[name] = np.concatenate(values) if values else np.zeros(0, dtype=np.float32)
    # safetensors wants arrays that lie in memory as they are read.
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    about = json.dumps(
        {
            "chains": [(chain.name, chain.num_res) for chain in parsed.chains],
            "resolution": parsed.resolution,
            "unusable": parsed.unusable,
            "notes": parsed.notes,
        }
    )
    # One entry: several are written in an order that changes.
    return save(arrays, {"about": f"{_checksum(about, arrays)} {about}"})


def _checksum(about: str, arrays: Mapping[str, NDArray[Any]]) -> int:
    """Of everything that is kept: a changed letter of a chain's name, or another type of number, counts as well."""
    forms = [(name, str(arrays[name].dtype), arrays[name].shape) for name in _ARRAYS]
    checksum = zlib.crc32(f"{about}{forms}".encode("utf-8", "surrogatepass"))
    for name in _ARRAYS:
        checksum = zlib.crc32(arrays[name].tobytes(), checksum)
    return checksum


def _load(entry: Path) -> ParsedFile | None:
    """An entry of the cache; None if there is none, or none that can be used."""
    try:
        # The file is mapped, not read: asking for its size first keeps an empty one from being an error of the system.
        if not os.path.getsize(entry):
            return None
        with safe_open(entry, "numpy") as file:
            checksum, _, text = (file.metadata() or {})["about"].partition(" ")
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        if checksum != str(_checksum(text, arrays)):
            return None
        about = json.loads(text)
        stops = np.cumsum([num_res for _, num_res in about["chains"]]).tolist()
        chains = []
        for (name, num_res), stop in zip(about["chains"], stops, strict=True):
            chains.append(ParsedChain(name, **{key: array[stop - num_res : stop] for key, array in arrays.items()}))
        return ParsedFile(tuple(chains), about["resolution"], tuple(about["unusable"]), tuple(about["notes"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        return None
