"""What Multiflow's inference leaves on disk for a sample, and which samples are there already."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from .backbone import atom37_from_trans_rot
from .interpolant import Trajectory
from .residues import MASK, sequence_from_types
from .sample_targets import Target
from .structure_files import write_fasta, write_pdb
from .whole_files import whole_folder


def is_complete(folder: Path, write_trajectories: bool) -> bool:
    """Whether a sample's folder holds what a run would write."""
    names = ["sample.pdb", "sample.fasta"]
    if write_trajectories:
        names += ["bb_traj.pdb", "x0_traj.pdb"]
    return all((folder / name).is_file() for name in names)


def read_sequence(folder: Path) -> str:
    """The sequence of a finished sample."""
    lines = (folder / "sample.fasta").read_text(encoding="utf-8").splitlines()
    return "".join(line.strip() for line in lines if not line.startswith(">"))


def write_sample(
    out_dir: Path, target: Target, item: int, noisy: Trajectory, clean: Trajectory, *, trajectories: bool, replace: bool
) -> str:
    """Writes one item of a sampled batch.

    The files: ``sample.pdb`` and ``sample.fasta``; with ``trajectories`` also ``bb_traj.pdb`` (noise first) and
    ``x0_traj.pdb`` (the model's predictions, the last one first, as in the original; there the residue names run the
    other way, here they are those of their own step); for forward folding ``<name>_gt_1.pdb``, the structure that was
    given; for inverse folding ``true_aa.fa``, its sequence.

    Args:
        out_dir: The run's output folder.
        target: The sample.
        item: Its place in the batch.
        noisy: Noisy states of the batch.
        clean: The model's predictions for the batch.
        trajectories: Whether to write them.
        replace: Whether a folder that is there goes away, rather than getting the files.

    Returns:
        The sequence.
    """
    atoms, final = noisy[-1]
    types = final[item].long().clone()
    masked = int((types == MASK).sum())
    if masked:  # the original writes alanine too
        warnings.warn(f"{target.folder}: {masked} residue(s) are still masked and are written as alanine", stacklevel=2)
        types[types == MASK] = 0
    sequence = sequence_from_types(types.tolist())
    sampled = torch.full((target.length,), 100.0)  # the B-factor of residues that were sampled
    with whole_folder(out_dir / target.folder, replace=replace) as folder:
        if trajectories:
            noisy_types = torch.stack([step[1][item].long() for step in noisy])
            noisy_types[-1] = types
            write_pdb(folder / "bb_traj.pdb", _positions(noisy, item), noisy_types, b_factors=sampled)
            clean_types = torch.stack([step[1][item].long() for step in clean])
            write_pdb(folder / "x0_traj.pdb", _positions(clean, item).flip(0), clean_types.flip(0), b_factors=sampled)
        known = target.reference
        if known is not None and target.task == "forward_folding":
            truth = atom37_from_trans_rot(known.trans[None], known.rotmats[None])[0]
            write_pdb(folder / f"{known.name}_gt_1.pdb", truth, known.aatypes)
        if known is not None and target.task == "inverse_folding":
            write_fasta(folder / "true_aa.fa", {"seq_1": known.sequence})
        write_fasta(folder / "sample.fasta", {target.name: sequence})
        write_pdb(folder / "sample.pdb", atoms[item], types, b_factors=sampled)
    return sequence


def _positions(trajectory: Trajectory, item: int) -> Float[Tensor, "t n 37 3"]:
    return torch.stack([step[0][item] for step in trajectory])
