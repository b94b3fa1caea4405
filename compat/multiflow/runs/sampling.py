"""Samples many proteins into a folder laid out as Multiflow's inference lays it out.

::

    out_dir/
        run.json                       what ran: arguments, versions, kernels, processes, seeds, times
        sample.fasta                   the sequences of all finished samples in the folder
        length_100/sample_0/
            sample.pdb  sample.fasta
            bb_traj.pdb  x0_traj.pdb   with write_trajectories

A structure's samples stand in ``length_157/1odh``. ProteinMPNN, ESMFold and the metrics of the original are not run.
Hidden files are claims and half-written folders of processes at work; what a killed one leaves of them is harmless, and
the next run clears it away.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from ....errors import BadInput
from ...files.progress import bar_shown, progress_bar
from ..config.sections import InterpolantConfig
from ..flow.interpolant import Interpolant, Model, device_of
from .contigs import motif_inputs
from .rank import Worker
from .run_log import RunLog, SampleRecord
from .sample_folder import ENDINGS, Format, check_places, clear_leftovers, is_complete, write_sample
from .targets import Structures, Target, Task, batches, make_targets, read_references, structure_paths
from .work_sharing import SharedWork, share

Kernels = Sequence[str] | Callable[[], Sequence[str]]
"""Names of the kernels that ran, or a function that gives them."""


@dataclass(frozen=True)
class SamplingRun:
    """What ``run_sampling`` did.

    Attributes:
        out_dir: The output folder.
        samples: Every sample that was asked for, in order.
        seconds: Time of the whole run in this process.
    """

    out_dir: Path
    samples: tuple[SampleRecord, ...]
    seconds: float

    @property
    def written(self) -> tuple[SampleRecord, ...]:
        """The samples that this run made, in whichever process."""
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
    contigs: str | None = None,
    rewrite_fixed_types: bool = False,
    form: Format = "pdb",
    overwrite: bool = False,
    write_trajectories: bool = True,
    progress: bool | None = None,
    kernels: Kernels | None = None,
    arguments: Mapping[str, Any] | None = None,
    worker: Worker | None = None,
) -> SamplingRun:
    """Samples proteins, and writes each as soon as its batch is done.

    What holds about seeds: a sample's random draws depend on ``seed``, its length and its index (for folding, on the
    structure's name too) and on nothing else: not on the batch size, on which samples were there already, on ``num``,
    on the number of processes or on the device. So the files are the same, except for what the model itself makes of
    it: its arithmetic may round differently in a batch of another size, with another number of threads or on another
    device, and sampling can magnify that. Which samples stand in a batch together depends on ``lengths``, ``num`` and
    ``batch_size`` alone: a batch some of whose samples are there already is made whole, and what is missing of it is
    written. So on machines of one kind the files are the same byte for byte, however many processes make them, and
    however often they are stopped and started again.

    What holds about interruptions: a sample's folder is written aside and renamed when it is complete, so that after
    Ctrl-C, a crash or on a full disk every folder is whole. A second run with the same arguments makes what is missing.

    What holds about several processes in one folder, be they ranks of one run, the same command twice or other
    commands: each claims what it is making, and the others leave that alone, and take it over should it die. A run
    returns when all its samples are there, whoever made them.

    Args:
        model: A ``FlowModel`` or anything called like one. It is in eval mode while sampling, and as before afterwards.
        interpolant: An ``Interpolant``, or the ``interpolant`` section of a config; changed for the task by
            ``task_config``.
        out_dir: The output folder; it is made.
        lengths: Numbers of residues, for unconditional sampling. Repeated ones count once. For motif scaffolding those
            that a whole sample may have.
        num: Samples of each length or structure.
        task: ``unconditional``; ``forward_folding``: a backbone for the sequence of ``pdb``; ``inverse_folding``: a
            sequence for its backbone; ``motif_scaffolding``: a protein around residues of ``pdb``, which stay.
        pdb: PDB or mmCIF files, or folders of them, for all tasks but the first. As in the original, the model sees the
            residues of a file numbered on without gaps, as a single chain; a model that embeds chains
            (``embed_chain``) sees those of a complex, and numbers from 1 in each. Files have the chains of a complex
            in any case, with their names and numbers.
        chain: Chain or chains of the files to use; all by default.
        seed: Where all seeds come from.
        batch_size: Samples of the same length or structure that are made at a time.
        num_timesteps: Calls of the model; by default ``sampling.num_timesteps`` of the config.
        contigs: What is kept of the structure and how much is sampled, for motif scaffolding; see ``contigs.Contigs``.
        rewrite_fixed_types: See ``Interpolant.sample``.
        form: Format of the structure files, ``pdb`` or ``mmcif``.
        overwrite: Makes samples anew that are there already. A sample that lacks files this run would write (its
            trajectories) is made again in any case, and the other files in its folder stay. Several workers make each
            their own share anew, and do not wait for one another.
        write_trajectories: Whether to write ``bb_traj.pdb`` and ``x0_traj.pdb``: with 500 steps 80 kB a residue each.
            False, as in the original.
        progress: False hides the progress bar, which else appears on a terminal only, and for rank 0 only.
        kernels: Names of the kernels that ran, or a function that gives them, called after each batch.
        arguments: Anything else to note in ``run.json`` under ``arguments``; must be JSON.
        worker: Which of several processes this is: ``Worker.from_environment()`` under torchrun, srun or mpirun,
            ``Worker(rank, world_size)`` elsewhere. The only one by default. Ranks that all are given the default share
            the work as well, by their claims; they only begin at the same end of it.

    Returns:
        What was written, by all workers as far as they have said so, and what was kept.

    Raises:
        BadInput: Arguments that do not fit each other, or a file that cannot be read. Nothing is written then. Or the
            folder was removed meanwhile.
        OSError: A file cannot be written.
    """
    out_dir = Path(out_dir)
    worker = Worker() if worker is None else worker
    _check(task, lengths, num, pdb, batch_size, num_timesteps)
    if (contigs is not None) != (task == "motif_scaffolding"):
        needs = "needs contigs" if contigs is None else f"takes no contigs; {task} was asked for"
        raise BadInput(f"motif_scaffolding {needs}", "--task motif_scaffolding --contigs '10-40/A163-181/10-40'")
    if form not in ENDINGS:
        raise BadInput(f"format is {form!r}; it must be one of {', '.join(ENDINGS)}")
    cfg = task_config(interpolant, task)
    sampler = Interpolant(cfg)
    if isinstance(interpolant, Interpolant):
        sampler.set_device(interpolant.device)
    steps = cfg.sampling.num_timesteps if num_timesteps is None else num_timesteps
    references = read_references(task, pdb, chain)
    targets = make_targets(task, lengths, references, num, seed, contigs)
    _warn_of_lengths(model, targets)
    groups = list(batches(targets, batch_size))
    check_places(out_dir, [target.folder for target in targets])

    make_anew = {target.folder for batch in share(groups, worker) for target in batch} if overwrite else set()
    records = {}
    for target in targets:
        kept = target.folder not in make_anew and is_complete(out_dir / target.folder, write_trajectories, form)
        records[target.folder] = SampleRecord(
            target.folder, target.length, target.index, target.seed, "kept" if kept else "pending"
        )

    def is_done(target: Target) -> bool:
        record = records[target.folder]
        if record.status == "pending" and target.folder not in make_anew:  # another process may have made it
            if not is_complete(out_dir / target.folder, write_trajectories, form):
                return False
            records[target.folder] = replace(record, status="kept")
            return True
        return record.status != "pending"

    log = RunLog(
        out_dir,
        arguments={
            "task": task,
            "lengths": sorted({target.length for target in targets}),
            "num": num,
            "pdb": [str(path) for path in structure_paths(pdb)],
            "chain": chain if chain is None or isinstance(chain, str) else list(chain),
            "seed": seed,
            "batch_size": batch_size,
            "num_timesteps": steps,
            **({} if contigs is None else {"contigs": contigs, "rewrite_fixed_types": rewrite_fixed_types}),
            "format": form,
            "overwrite": overwrite,
            "write_trajectories": write_trajectories,
            **(arguments or {}),
        },
        interpolant=cfg.model_dump(mode="json"),
        samples=records,
        worker=worker,
        device=str(sampler.device or device_of(model)),
    )
    _begin(out_dir, log)
    work = SharedWork(out_dir, groups, worker, done=is_done, help_others=not overwrite)
    shown = worker.rank == 0 and bar_shown(progress)

    def make_all() -> None:
        with (
            _in_eval_mode(model),
            progress_bar("sampling", steps * len(work), shown) as advance,
            closing(iter(work)) as batches_to_make,
        ):
            left = len(work)
            for batch, mine in batches_to_make:
                batch_started = time.time()
                noisy, clean = sampler.sample(
                    len(batch),
                    batch[0].length,
                    model,
                    num_timesteps=num_timesteps,
                    seeds=[target.seed for target in batch],
                    keep_trajectory=write_trajectories,
                    on_step=advance,
                    rewrite_fixed_types=rewrite_fixed_types,
                    **_known_inputs(model, batch),
                )
                seconds = round(time.time() - batch_started, 3)
                log.kernels = list(kernels() if callable(kernels) else kernels or ())
                for item, target in enumerate(batch):
                    if target not in mine:
                        continue
                    write_sample(
                        out_dir,
                        target,
                        item,
                        noisy,
                        clean,
                        trajectories=write_trajectories,
                        replace=overwrite,
                        form=form,
                    )
                    records[target.folder] = replace(
                        records[target.folder],
                        status="written",
                        seconds=seconds,
                        batch_size=len(batch),
                        rank=worker.rank,
                    )
                log.update()
                left -= 1
                if shown and not work.counted_lately:
                    work.look_again()
                    advance(steps * max(left - len(work), 0))
                    left = min(left, len(work))

    done = _account_for(make_all, log, out_dir, worker)
    gone = [record.folder for record in done if record.status != "pending" and not (out_dir / record.folder).is_dir()]
    if gone:
        raise BadInput(
            f"{len(gone)} sample(s) that were finished are gone from {out_dir} ({', '.join(gone[:3])}): something "
            "removed them while the run was going on",
            "run the same command again; it makes them anew",
        )
    return SamplingRun(out_dir, tuple(done), log.seconds)


def _begin(out_dir: Path, log: RunLog) -> None:
    """Makes the folder and begins the account."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        clear_leftovers(out_dir)
        log.start()
    except OSError as error:
        raise BadInput(f"{out_dir}: cannot be written to ({error.strerror or error})") from error


def _account_for(make_all: Callable[[], None], log: RunLog, out_dir: Path, worker: Worker) -> list[SampleRecord]:
    """Does the work, and writes down how it ended, whatever that was."""
    try:
        make_all()
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        first_line = (str(error).splitlines() or [""])[0]
        told = None if stopped else f"{type(error).__name__}: {first_line}"
        # A disk that is full, or a folder that went away: what stopped the work stops the account as well.
        with suppress(OSError):
            log.finish("interrupted" if stopped else "failed", told)
        whose = "" if worker.alone else f"{worker}: "
        if isinstance(error, OSError) and not out_dir.is_dir():
            raise BadInput(f"{whose}{out_dir} was removed while samples were being written to it") from error
        if isinstance(error, FileNotFoundError) and str(error.filename).startswith(str(out_dir)):
            raise BadInput(
                f"{whose}something in {out_dir} was removed while samples were being written to it ({error.filename})",
                "run the same command again; it makes what is missing",
            ) from error
        if not stopped:
            error.add_note(f"{whose}the samples that are finished stay in {out_dir}; the same command makes the rest")
        raise
    try:
        return log.finish("complete")
    except FileNotFoundError as error:
        raise BadInput(f"{out_dir} was removed while samples were being written to it") from error


@contextmanager
def _in_eval_mode(model: Model) -> Iterator[None]:
    """In eval mode inside, as before afterwards."""
    module = model if isinstance(model, torch.nn.Module) else None
    was_training = module is not None and module.training
    if module is not None:
        module.eval()
    try:
        yield
    finally:
        if module is not None:
            module.train(was_training)


def _check(
    task: str,
    lengths: Sequence[int],
    num: int,
    pdb: Structures | None,
    batch_size: int,
    num_timesteps: int | None,
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
        if lengths and task != "motif_scaffolding":
            raise BadInput(f"{task} takes its length from the structure: leave out lengths")
        if not structure_paths(pdb):
            raise BadInput(f"{task} needs a structure (pdb)")
    for name, values in (("lengths", lengths), ("num", [num]), ("batch_size", [batch_size])):
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BadInput(f"{name} must be whole numbers of at least 1, got {value!r}")
    if num_timesteps is not None and num_timesteps < 2:
        raise BadInput(f"num_timesteps is {num_timesteps}: sampling takes at least 2 calls of the model")


def _warn_of_lengths(model: Model, targets: Sequence[Target]) -> None:
    """Says where samples are longer than what the model's config allows for: it runs, and nobody trained it there."""
    longest = getattr(getattr(getattr(model, "model_config", None), "node_features", None), "max_num_res", None)
    beyond = sorted({target.length for target in targets if longest is not None and target.length > longest})
    if beyond:
        shown = ", ".join(map(str, beyond[:4])) + (" and more" if len(beyond) > 4 else "")
        warnings.warn(
            f"{shown} residues: no model of this kind has been trained at such a length (its config's max_num_res is "
            f"{longest}); it runs, and what comes out may be no protein",
            stacklevel=3,
        )


def _known_inputs(model: Model, batch: Sequence[Target]) -> dict[str, Any]:
    """What the original's inference hands to the sampler for a task, and the chains of a complex."""
    known, num_batch, task = batch[0].reference, len(batch), batch[0].task
    if known is None:
        return {}
    motifs = [target.motif for target in batch if target.motif is not None]
    inputs: dict[str, Any]
    if motifs:
        inputs = motif_inputs(motifs, known)
        chain_index = torch.stack([motif.chain_index for motif in motifs])
        numbers = [motif.labels.numbers + 1 for motif in motifs if motif.labels is not None]
        residue_index = torch.stack(numbers) if numbers else None
    else:
        chain_index = known.chain_index.repeat(num_batch, 1)
        residue_index = known.residue_index.repeat(num_batch, 1)
    if task == "forward_folding":
        inputs = {"aatypes_1": known.aatypes.repeat(num_batch, 1), "forward_folding": True, "separate_t": True}
    elif task == "inverse_folding":
        inputs = {
            "trans_1": known.trans.repeat(num_batch, 1, 1),
            "rotmats_1": known.rotmats.repeat(num_batch, 1, 1, 1),
            "inverse_folding": True,
            "separate_t": True,
        }
    if int(chain_index.max()) > 1 and residue_index is not None and _embeds_chains(model):
        inputs |= {"chain_idx": chain_index, "res_idx": residue_index}
    return inputs


def _embeds_chains(model: Model) -> bool:
    config = getattr(model, "model_config", None)
    sections = (getattr(config, name, None) for name in ("node_features", "edge_features"))
    return any(bool(getattr(section, "embed_chain", False)) for section in sections)
