"""What Multiflow's inference leaves on disk for a sample, and which samples are there already."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ....errors import BadInput
from ...files.atomic import put_back, target_of, whole_folder, write_whole
from ...files.locks import Claim, claimed
from ..flow.interpolant import Trajectory
from ..structures.backbone import atom37_from_trans_rot
from ..structures.residue_types import MASK, sequence_from_types
from ..structures.writing import write_fasta, write_mmcif, write_pdb
from .targets import Target

Format = Literal["pdb", "mmcif"]
"""The format of structure files that are written."""

ENDINGS: dict[Format, str] = {"pdb": ".pdb", "mmcif": ".cif"}


def is_complete(folder: Path, write_trajectories: bool, form: Format = "pdb") -> bool:
    """Whether a sample's folder holds what a run would write."""
    names = [f"sample{ENDINGS[form]}", "sample.fasta"]
    if write_trajectories:
        names += [f"bb_traj{ENDINGS[form]}", f"x0_traj{ENDINGS[form]}"]
    return folder.is_dir() and all((folder / name).is_file() for name in names)


def read_sequences(folder: Path) -> dict[str, str]:
    """The sequences of a finished sample by their names in its file: one for each chain."""
    sequences: dict[str, str] = {}
    name = ""
    for line in (folder / "sample.fasta").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(">"):
            name = line[1:].strip()
        sequences[name] = sequences.get(name, "") + (line.strip() if not line.startswith(">") else "")
    return sequences


def write_all_sequences(out_dir: Path, first: Iterable[str]) -> None:
    """Writes ``sample.fasta``: every finished sample of the folder, whichever run made it.

    Args:
        out_dir: The output folder.
        first: Folders of the samples that come first, in this order; the others follow by length and name.
    """
    found = [
        f"{lengths.name}/{folder.name}"
        for lengths in out_dir.glob("length_*")
        if lengths.is_dir()
        for folder in lengths.iterdir()
        if not folder.name.startswith(".") and any(is_complete(folder, False, form) for form in ENDINGS)
    ]
    there = set(found)
    names = dict.fromkeys(name for name in first if name in there) | dict.fromkeys(sorted(found, key=_as_counted))
    sequences = {}
    for name in names:
        try:
            own = read_sequences(out_dir / name)
        except FileNotFoundError:
            continue  # another run is replacing it, and will write this file again
        single = name.replace("/", "_")
        sequences.update({single: next(iter(own.values()))} if len(own) == 1 else own)
    write_fasta(out_dir / "sample.fasta", sequences)


def check_places(out_dir: Path, folders: Iterable[str]) -> None:
    """Refuses to begin where a file stands in a folder's place, or the other way round.

    Raises:
        BadInput: That is so.
    """
    places = [out_dir / folder for folder in folders]
    for place in dict.fromkeys([out_dir, *(place.parent for place in places), *places]):
        if place.exists() and not place.is_dir():
            raise BadInput(
                f"{place} is a file, not a folder to write samples to",
                "move it away, or sample into another folder",
            )
    for name in ("run.json", "sample.fasta"):
        if (out_dir / name).is_dir():
            raise BadInput(f"{out_dir / name} is a folder, and a file of that name is to be written")


def clear_leftovers(out_dir: Path) -> None:
    """Clears away what killed processes left beside the samples: half-written folders and claims.

    What another process is working at stays. Where the file system has no locks, nobody can tell, and all stays.
    """
    for parent in out_dir.glob("length_*"):
        names = _hidden(parent)
        for target in {target_of(name) or claimed(name) for name in names} - {None}:
            claim = Claim.take(parent / str(target))
            if claim is not None:
                with claim:
                    if claim.locked:
                        clear_leftovers_of(parent / str(target), names)


def clear_leftovers_of(place: Path, names: Iterable[str] | None = None) -> None:
    """The same for one sample, which this process has claimed.

    Args:
        place: The sample's folder.
        names: What stands beside it, if that has been listed.
    """
    for name in _hidden(place.parent) if names is None else names:
        if target_of(name) == place.name:
            put_back(place.parent / name)


def _hidden(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []


def write_sample(
    out_dir: Path,
    target: Target,
    item: int,
    noisy: Trajectory,
    clean: Trajectory,
    *,
    trajectories: bool,
    replace: bool,
    form: Format = "pdb",
) -> str:
    """Writes one item of a sampled batch.

    The files: ``sample.pdb`` and ``sample.fasta``; with ``trajectories`` also ``bb_traj.pdb`` (noise first) and
    ``x0_traj.pdb`` (the model's predictions, the last one first, as in the original; there the residue names run the
    other way, here they are those of their own step); for forward folding ``<name>_gt_1.pdb``, the structure that was
    given; for inverse folding ``true_aa.fa``, its sequence; for motif scaffolding ``contigs.json``, which residues were
    kept. A complex keeps the names of its chains and their numbers, and FASTA files have an entry for each chain.

    Args:
        out_dir: The run's output folder.
        target: The sample.
        item: Its place in the batch.
        noisy: Noisy states of the batch.
        clean: The model's predictions for the batch.
        trajectories: Whether to write them.
        replace: Whether a folder that is there goes away, rather than getting the files.
        form: Format of the structure files.

    Returns:
        The sequence.

    Raises:
        OSError: The files cannot be written; the error names the sample's folder.
    """
    atoms, final = noisy[-1]
    types = final[item].long().clone()
    masked = int((types == MASK).sum())
    if masked:  # the original writes alanine too
        warnings.warn(f"{target.folder}: {masked} residue(s) are still masked and are written as alanine", stacklevel=2)
        types[types == MASK] = 0
    sequence = sequence_from_types(types.tolist())
    # The B-factor of residues that were sampled is 100, of those that were kept 0.
    sampled = torch.full((target.length,), 100.0) if target.motif is None else 100.0 * target.motif.sampled
    labels = target.labels
    ending = ENDINGS[form]

    def write(path: Path, positions: Tensor, residues: Tensor, b_factors: Tensor | None) -> None:
        writer = write_pdb if form == "pdb" else write_mmcif
        writer(path, positions, residues, b_factors=b_factors, labels=labels)

    def by_chain(name: str, letters: str) -> dict[str, str]:
        if labels is None:
            return {name: letters}
        return {f"{name}_{chain}": part for chain, part in labels.of_chains(letters).items()}

    try:
        with whole_folder(out_dir / target.folder, replace=replace) as folder:
            if trajectories:
                noisy_types = torch.stack([step[1][item].long() for step in noisy])
                noisy_types[-1] = types
                write(folder / f"bb_traj{ending}", _positions(noisy, item), noisy_types, sampled)
                clean_types = torch.stack([step[1][item].long() for step in clean])
                write(folder / f"x0_traj{ending}", _positions(clean, item).flip(0), clean_types.flip(0), sampled)
            known = target.reference
            if known is not None and target.task == "forward_folding":
                truth = atom37_from_trans_rot(known.trans[None], known.rotmats[None])[0]
                write(folder / f"{known.name}_gt_1{ending}", truth, known.aatypes, None)
            if known is not None and target.task == "inverse_folding":
                write_fasta(folder / "true_aa.fa", by_chain("seq_1", known.sequence))
            if known is not None and target.motif is not None:
                write_whole(folder / "contigs.json", json.dumps(target.motif.as_dict(known), indent=1) + "\n")
            write_fasta(folder / "sample.fasta", by_chain(target.name, sequence))
            write(folder / f"sample{ending}", atoms[item], types, sampled)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(out_dir / target.folder)) from error
    return sequence


def _as_counted(name: str) -> list[tuple[int, str]]:
    """Orders names with numbers in them as one counts: sample_2 before sample_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _positions(trajectory: Trajectory, item: int) -> Float[Tensor, "t n 37 3"]:
    return torch.stack([step[0][item] for step in trajectory])
