"""Samples many proteins into a folder laid out as Multiflow's inference lays it out.

::

    out_dir/
        run.json                       what ran: arguments, versions, kernels, seeds, times
        sample.fasta                   the sequences of all samples that this run was asked for
        length_100/sample_0/
            sample.pdb  sample.fasta
            bb_traj.pdb  x0_traj.pdb   with write_trajectories

A structure's samples stand in ``length_157/1odh``. ProteinMPNN, ESMFold and the metrics of the original are not run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from ..errors import BadInput
from .configuration import InterpolantConfig
from .interpolant import Interpolant, Model
from .progress import progress_bar
from .run_log import RunLog, SampleRecord, Status
from .sample_folder import is_complete, read_sequence, write_sample
from .sample_targets import Structures, Task, batches, make_targets, read_references, structure_paths
from .structure_files import write_fasta
from .structures import Backbone

Kernels = Sequence[str] | Callable[[], Sequence[str]]
"""Names of the kernels that ran, or a function that gives them."""


@dataclass(frozen=True)
class SamplingRun:
    """What ``run_sampling`` did.

    Attributes:
        out_dir: The output folder.
        samples: Every sample that was asked for, in order.
        seconds: Time of the whole run.
    """

    out_dir: Path
    samples: tuple[SampleRecord, ...]
    seconds: float

    @property
    def written(self) -> tuple[SampleRecord, ...]:
        """The samples that this run made."""
        return tuple(sample for sample in self.samples if sample.status == "written")

    @property
    def kept(self) -> tuple[SampleRecord, ...]:
        """The samples that were there already."""
        return tuple(sample for sample in self.samples if sample.status == "kept")


def task_config(interpolant: Any, task: Task) -> InterpolantConfig:
    """Changes an interpolant's settings to those that the original's inference uses for a task.

    Folding either way tells the model separate times for structure and sequence (``codesign_separate_t``); forward
    folding has no noise on residue types and does not unmask by purity. The rest, the temperature included, stays as
    it is given.

    Args:
        interpolant: An ``Interpolant``, or the ``interpolant`` section of a config in any form it takes.
        task: What is sampled.
    """
    cfg = interpolant.cfg if isinstance(interpolant, Interpolant) else Interpolant(interpolant).cfg
    if task == "unconditional":
        return cfg
    if task == "forward_folding":
        aatypes = cfg.aatypes.model_copy(update={"noise": 0.0, "do_purity": False})
        return cfg.model_copy(update={"codesign_separate_t": True, "aatypes": aatypes})
    return cfg.model_copy(update={"codesign_separate_t": True})


def run_sampling(
    model: Model,
    interpolant: Any,
    out_dir: str | os.PathLike[str],
    *,
    lengths: Sequence[int] = (),
    num: int = 1,
    task: Task = "unconditional",
    pdb: Structures | None = None,
    chain: str | Sequence[str] | None = None,
    seed: int = 123,
    batch_size: int = 1,
    num_timesteps: int | None = None,
    overwrite: bool = False,
    write_trajectories: bool = True,
    progress: bool | None = None,
    kernels: Kernels | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> SamplingRun:
    """Samples proteins, and writes each as soon as its batch is done.

    What holds about seeds: a sample's random draws depend on ``seed``, its length and its index (for folding, on the
    structure's name too) and on nothing else: not on the batch size, on which samples were there already, on ``num``,
    or on the device. So the files are the same, except for what the model itself makes of it: its arithmetic may round
    differently in a batch of another size or on another device, and sampling can magnify that.

    What holds about interruptions: a sample's folder is written aside and renamed when it is complete, so that after
    Ctrl-C or a crash every folder is whole. A second run with the same arguments makes what is missing.

    Args:
        model: A ``FlowModel`` or anything called like one. It is in eval mode while sampling, and as before afterwards.
        interpolant: An ``Interpolant``, or the ``interpolant`` section of a config; changed for the task by
            ``task_config``.
        out_dir: The output folder; it is made.
        lengths: Numbers of residues, for unconditional sampling. Repeated ones count once.
        num: Samples of each length or structure.
        task: ``unconditional``; ``forward_folding``: a backbone for the sequence of ``pdb``; ``inverse_folding``: a
            sequence for its backbone.
        pdb: One or several PDB or mmCIF files, for folding. As in the original, the residues of a file are numbered on
            without gaps, as a single chain.
        chain: Chain or chains of the files to use; all by default.
        seed: Where all seeds come from.
        batch_size: Samples of the same length or structure that are made at a time.
        num_timesteps: Calls of the model; by default ``sampling.num_timesteps`` of the config.
        overwrite: Makes samples anew that are there already. A sample that lacks files this run would write (its
            trajectories) is made again in any case, and the other files in its folder stay.
        write_trajectories: Whether to write ``bb_traj.pdb`` and ``x0_traj.pdb``: with 500 steps 80 kB a residue each.
            False, as in the original.
        progress: False hides the progress bar, which else appears on a terminal only.
        kernels: Names of the kernels that ran, or a function that gives them, called after each batch.
        arguments: Anything else to note in ``run.json`` under ``arguments``; must be JSON.

    Returns:
        What was written and what was kept.

    Raises:
        BadInput: Arguments that do not fit each other, or a file that cannot be read. Nothing is written then.
    """
    out_dir = Path(out_dir)
    _check(task, lengths, num, pdb, batch_size, num_timesteps, out_dir)
    cfg = task_config(interpolant, task)
    sampler = Interpolant(cfg)
    if isinstance(interpolant, Interpolant):
        sampler.set_device(interpolant.device)
    steps = cfg.sampling.num_timesteps if num_timesteps is None else num_timesteps
    references = read_references(task, pdb, chain)
    targets = make_targets(task, lengths, references, num, seed)

    records = {}
    pending = []
    for target in targets:
        done = not overwrite and is_complete(out_dir / target.folder, write_trajectories)
        records[target.folder] = SampleRecord(
            target.folder, target.length, target.index, target.seed, "kept" if done else "pending"
        )
        if not done:
            pending.append(target)

    log = RunLog(
        out_dir / "run.json",
        arguments={
            "task": task,
            "lengths": sorted({target.length for target in targets}),
            "num": num,
            "pdb": [str(path) for path in structure_paths(pdb)],
            "chain": chain if chain is None or isinstance(chain, str) else list(chain),
            "seed": seed,
            "batch_size": batch_size,
            "num_timesteps": steps,
            "overwrite": overwrite,
            "write_trajectories": write_trajectories,
            **(arguments or {}),
        },
        interpolant=cfg.model_dump(mode="json"),
        samples=records,
    )
    if len(pending) < len(targets):
        log.warn_of_other_settings()

    todo = list(batches(pending, batch_size))
    module = model if isinstance(model, torch.nn.Module) else None
    was_training = module is not None and module.training
    log.write("running")
    status: Status = "failed"
    try:
        if module is not None:
            module.eval()
        with progress_bar("sampling", steps * len(todo), progress) as advance:
            for batch in todo:
                batch_started = time.time()
                noisy, clean = sampler.sample(
                    len(batch),
                    batch[0].length,
                    model,
                    num_timesteps=num_timesteps,
                    seeds=[target.seed for target in batch],
                    keep_trajectory=write_trajectories,
                    on_step=advance,
                    **_folding_inputs(task, batch[0].reference, len(batch)),
                )
                seconds = round(time.time() - batch_started, 3)
                log.kernels = list(kernels() if callable(kernels) else kernels or ())
                for item, target in enumerate(batch):
                    write_sample(
                        out_dir, target, item, noisy, clean, trajectories=write_trajectories, replace=overwrite
                    )
                    record = records[target.folder]
                    records[target.folder] = replace(record, status="written", seconds=seconds, batch_size=len(batch))
                log.write("running")
        status = "complete"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        if module is not None:
            module.train(was_training)
        finished = [target for target in targets if records[target.folder].status != "pending"]
        write_fasta(
            out_dir / "sample.fasta", {target.name: read_sequence(out_dir / target.folder) for target in finished}
        )
        log.write(status)
    return SamplingRun(out_dir, tuple(records.values()), log.seconds)


def _check(
    task: str,
    lengths: Sequence[int],
    num: int,
    pdb: Structures | None,
    batch_size: int,
    num_timesteps: int | None,
    out_dir: Path,
) -> None:
    if task not in get_args(Task):
        raise BadInput(f"task is {task!r}; it must be one of {', '.join(get_args(Task))}")
    if task == "unconditional":
        if pdb is not None:
            raise BadInput(
                "unconditional sampling takes no structure (pdb)", "choose task forward_folding or inverse_folding"
            )
        if not lengths:
            raise BadInput("unconditional sampling needs at least one length")
    else:
        if lengths:
            raise BadInput(f"{task} takes its length from the structure: leave out lengths")
        if not structure_paths(pdb):
            raise BadInput(f"{task} needs a structure (pdb)")
    for name, values in (("lengths", lengths), ("num", [num]), ("batch_size", [batch_size])):
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BadInput(f"{name} must be whole numbers of at least 1, got {value!r}")
    if num_timesteps is not None and num_timesteps < 2:
        raise BadInput(f"num_timesteps is {num_timesteps}: sampling takes at least 2 calls of the model")
    if out_dir.exists() and not out_dir.is_dir():
        raise BadInput(f"{out_dir} is a file, not a folder to write samples to")


def _folding_inputs(task: Task, known: Backbone | None, num_batch: int) -> dict[str, Any]:
    """What the original's inference hands to the sampler for a task."""
    if known is None:
        return {}
    if task == "forward_folding":
        return {"aatypes_1": known.aatypes.repeat(num_batch, 1), "forward_folding": True, "separate_t": True}
    return {
        "trans_1": known.trans.repeat(num_batch, 1, 1),
        "rotmats_1": known.rotmats.repeat(num_batch, 1, 1, 1),
        "inverse_folding": True,
        "separate_t": True,
    }
