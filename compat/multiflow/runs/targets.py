"""Which samples a run is asked for: their folders, seeds and batches."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ....errors import BadInput
from ..dataset.files import structure_files
from ..structures.reading import Backbone, read_structure
from ..structures.residue_types import MASK
from ..structures.writing import ResidueLabels
from .contigs import Contigs, Motif

Task = Literal["unconditional", "forward_folding", "inverse_folding", "motif_scaffolding"]
Structures = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""Structure files, and folders of them: one or several."""

_LONGEST_NAME = 60


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
        reference: The structure it is folded or designed from, or whose motif is kept.
        motif: Where the motif's residues stand in it.
    """

    folder: str
    task: Task
    length: int
    index: int
    seed: int
    reference: Backbone | None = None
    motif: Motif | None = None

    @property
    def labels(self) -> ResidueLabels | None:
        """Chains and numbers of its residues in files; None for those of a single chain A, counted from 0."""
        if self.motif is not None:
            return self.motif.labels
        known = self.reference
        return known.labels if known is not None and len(known.chains) > 1 else None

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
    """Reads the structures of a folding or scaffolding run; of a folder every structure file in it.

    Structures of one name get the names of their folders before it, as many as tell them apart. A file of a folder that
    cannot be read is passed over with a warning; one that is named itself is not.

    Raises:
        BadInput: A file that is named cannot be read, or no file of a folder can.
    """
    found: dict[Path, Backbone] = {}
    for path in structure_paths(pdb):
        if not path.is_dir():
            found.setdefault(path.resolve(), read_structure(path, chain=chain))
            continue
        reasons: list[str] = []
        files = structure_files(path)
        for file in files:
            try:
                found.setdefault(file.resolve(), read_structure(file, chain=chain))
            except BadInput as error:
                reasons.append(error.message)
        if len(reasons) == len(files):
            raise BadInput(f"{path}: none of its {len(files)} structure file(s) can be used; the first: {reasons[0]}")
        if reasons:
            warnings.warn(
                f"{path}: {len(reasons)} of {len(files)} files cannot be used and are passed over, "
                f"the first: {reasons[0]}",
                stacklevel=3,
            )
    names = _names(list(found), [known.name for known in found.values()])
    references = [replace(known, name=name) for name, known in zip(names, found.values(), strict=True)]
    for path, known in zip(found, references, strict=True):
        unknown = int((known.aatypes == MASK).sum())
        if unknown and task == "forward_folding":
            warnings.warn(
                f"{path}: {unknown} residue(s) of unknown type; the model will fold the chain as if masked there",
                stacklevel=3,
            )
    return references


def _names(paths: Sequence[Path], stems: Sequence[str]) -> list[str]:
    """Names that differ, for structures of the files: those of their folders, or their endings, come to those alike."""
    names = list(stems)
    for depth in range(1, max(len(path.parts) for path in paths) if paths else 0):
        twice = {name for name, count in Counter(names).items() if count > 1}
        if not twice:
            return names
        for place, (path, stem) in enumerate(zip(paths, stems, strict=True)):
            parents = path.parent.parts[1:][-depth:]
            if names[place] in twice:
                names[place] = "_".join([*parents, stem])
    twice = {name for name, count in Counter(names).items() if count > 1}
    for place, path in enumerate(paths):  # files of one folder that differ in their endings alone
        if names[place] in twice:
            names[place] = f"{stems[place]}_{'_'.join(path.name.split('.')[1:])}"
    counted: Counter[str] = Counter()
    for place, name in enumerate(names):
        counted[name] += 1
        names[place] = name if counted[name] == 1 else f"{name}_{counted[name]}"
    return names


def make_targets(
    task: Task,
    lengths: Sequence[int],
    references: list[Backbone],
    num: int,
    seed: int,
    contigs: str | None = None,
) -> list[Target]:
    """Every sample of a run, in order.

    Raises:
        BadInput: The contigs are wrong, or do not belong to a structure.
    """
    if task == "unconditional":
        return [
            Target(f"length_{length}/sample_{index}", task, length, index, derive_seed(seed, length, index))
            for length in dict.fromkeys(lengths)
            for index in range(num)
        ]
    if task == "motif_scaffolding":
        return [
            target
            for known in references
            for target in _scaffolds(known, Contigs(contigs or "", known), lengths, num, seed)
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


def _scaffolds(known: Backbone, contigs: Contigs, lengths: Sequence[int], num: int, seed: int) -> Iterator[Target]:
    """The samples around one motif, those of one length beside each other."""
    name = re.sub(r"[^A-Za-z0-9-]+", "_", contigs.text)
    if len(name) > _LONGEST_NAME:
        digest = hashlib.sha256(contigs.text.encode()).hexdigest()[:8]
        name = f"{name[: _LONGEST_NAME - 9]}_{digest}"
    targets = []
    for index in range(num):
        own = derive_seed(seed, known.name, contigs.text, index)
        motif = contigs.draw(own, lengths)
        length = len(motif.source)
        folder = f"length_{length}/{known.name}_{name}_sample_{index}"
        targets.append(Target(folder, "motif_scaffolding", length, index, own, known, motif))
    yield from sorted(targets, key=lambda target: (target.length, target.index))


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
