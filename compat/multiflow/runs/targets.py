"""Which samples a run is asked for: their folders, seeds and batches."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ....errors import BadInput
from ..structures.reading import Backbone, read_structure
from ..structures.residue_types import MASK

Task = Literal["unconditional", "forward_folding", "inverse_folding"]
Structures = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""One structure file or several."""


@dataclass(frozen=True)
class Target:
    """One sample to be made.

    Attributes:
        folder: Where it goes, relative to the output folder: ``length_100/sample_0``, or ``length_157/1odh`` for a
            structure (further samples of it: ``length_157/1odh_sample_1``).
        task: What is sampled.
        length: Number of residues.
        index: Number of the sample, from 0.
        seed: The seed of all its random draws.
        reference: The structure it is folded or designed from.
    """

    folder: str
    task: Task
    length: int
    index: int
    seed: int
    reference: Backbone | None = None

    @property
    def name(self) -> str:
        """The sample's name in FASTA files."""
        return self.folder.replace("/", "_")


def derive_seed(seed: int, *parts: str | int) -> int:
    """A seed from 0 to 2**63 - 1 that depends on every argument, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, (seed, *parts))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def structure_paths(pdb: Structures | None) -> list[Path]:
    """The files, as a list."""
    if pdb is None:
        return []
    return [Path(pdb)] if isinstance(pdb, (str, os.PathLike)) else [Path(path) for path in pdb]


def read_references(task: Task, pdb: Structures | None, chain: str | Sequence[str] | None) -> list[Backbone]:
    """Reads the structures of a folding run.

    Raises:
        BadInput: One cannot be read, or two have the same name.
    """
    references: list[Backbone] = []
    for path in structure_paths(pdb):
        reference = read_structure(path, chain=chain)
        if any(reference.name == other.name for other in references):
            raise BadInput(f"two structures are named {reference.name!r}: their samples would share a folder")
        unknown = int((reference.aatypes == MASK).sum())
        if unknown and task == "forward_folding":
            warnings.warn(
                f"{path}: {unknown} residue(s) of unknown type; the model will fold the chain as if masked there",
                stacklevel=3,
            )
        references.append(reference)
    return references


def make_targets(task: Task, lengths: Sequence[int], references: list[Backbone], num: int, seed: int) -> list[Target]:
    """Every sample of a run, in order."""
    if task == "unconditional":
        return [
            Target(f"length_{length}/sample_{index}", task, length, index, derive_seed(seed, length, index))
            for length in dict.fromkeys(lengths)
            for index in range(num)
        ]
    return [
        Target(
            f"length_{known.num_res}/{known.name}" + (f"_sample_{index}" if index else ""),
            task,
            known.num_res,
            index,
            derive_seed(seed, known.name, known.num_res, index),
            known,
        )
        for known in references
        for index in range(num)
    ]


def batches(targets: list[Target], batch_size: int) -> Iterator[list[Target]]:
    """Neighbours of one length or structure, at most ``batch_size`` together."""
    batch: list[Target] = []
    for target in targets:
        apart = batch and (target.length != batch[0].length or target.reference is not batch[0].reference)
        if apart or len(batch) == batch_size:
            yield batch
            batch = []
        batch.append(target)
    if batch:
        yield batch
