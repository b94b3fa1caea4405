"""`foldkernels sample`: proteins from a Multiflow checkpoint."""

from __future__ import annotations

import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Debug, Device, Json, Kernel, best_device, device_of_rank, split
from .options import lengths as length_numbers
from .reporting import print_json, reported, stopped_by_sigterm

if TYPE_CHECKING:
    from ..compat.multiflow.model import FlowModel
    from ..compat.multiflow.runs.rank import Worker
    from ..compat.multiflow.runs.sampling import SamplingRun

NAME = "sample"
SUMMARY = "Sample proteins from a Multiflow checkpoint."
EXAMPLES = """\b
Tasks, and what each needs:
  unconditional     structure and sequence from nothing: --length
  inverse_folding   a sequence for a backbone: --pdb
  forward_folding   a backbone for a sequence: --pdb, whose sequence is read
  motif_scaffolding a protein around residues that stay: --pdb, --contigs (RFdiffusion's notation)
\b
Examples:
  foldkernels sample weights/ --length 100 --num 4 --kernel flash --out out/
  foldkernels sample weights/ --length 60-80,100 --timesteps 200 --out out/
  foldkernels sample weights/ --task inverse_folding --pdb 1odh.pdb --chain A --out out/
  foldkernels sample weights/ --task forward_folding --pdb 1odh.pdb --num 8 --batch-size 4 --out out/
  foldkernels sample weights/ --task motif_scaffolding --pdb 1odh.pdb --contigs 10-40/A40-60/20 --out out/
\b
On many GPUs and machines (the files are the same, whatever their number):
  torchrun --nproc-per-node 8 -m foldkernels sample weights/ --length 100 -n 1000 --out out/
  srun --ntasks 16 --gpus-per-task 1 foldkernels sample weights/ --length 100 -n 1000 --out /shared/out/
\b
Writes, for each sample:
  OUT/length_100/sample_0/   (folding: OUT/length_157/1odh/)
    sample.pdb, bb_traj.pdb, x0_traj.pdb, sample.fasta (--format mmcif: .cif)
and for the run:
  OUT/sample.fasta   the sequences of all samples in OUT
  OUT/run.json       arguments, versions, kernels that ran, processes, seeds, times
"""


class Task(StrEnum):
    """What is sampled."""

    unconditional = "unconditional"
    inverse_folding = "inverse_folding"
    forward_folding = "forward_folding"
    motif_scaffolding = "motif_scaffolding"


class Format(StrEnum):
    """Format of the structure files."""

    pdb = "pdb"
    mmcif = "mmcif"


@reported
def run(
    weights: Annotated[
        Path,
        typer.Argument(
            metavar="WEIGHTS",
            help="A folder with last.ckpt or model.safetensors, and config.yaml; or such a file. No code in it is run.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The output folder; it is made.", show_default=False)],
    length: Annotated[
        list[str] | None,
        typer.Option(
            "--length",
            "-l",
            metavar="N[,N...]",
            help="Residues of a sample; 60-80 is each length from 60 to 80, 60-80:5 every fifth; repeatable.",
        ),
    ] = None,
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="Samples of each length or structure.")] = 1,
    task: Annotated[Task, typer.Option("--task", help="See below.")] = Task.unconditional,
    pdb: Annotated[
        list[Path] | None,
        typer.Option(
            "--pdb",
            metavar="FILE",
            help="PDB or mmCIF file, or a folder of them; repeatable.",
        ),
    ] = None,
    chain: Annotated[
        list[str] | None,
        typer.Option("--chain", metavar="A[,B...]", help="Chains of the files to use.  [default: all]"),
    ] = None,
    contigs: Annotated[
        str | None,
        typer.Option(
            "--contigs", metavar="TEXT", help="Lengths to sample, residues to keep."
        ),
    ] = None,
    rewrite_fixed_types: Annotated[
        bool,
        typer.Option(
            "--rewrite-fixed-types",
            help="Let the last step rewrite kept types.",
        ),
    ] = False,
    timesteps: Annotated[
        int | None, typer.Option("--timesteps", min=2, help="Calls of the model.  [default: the config's]")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Samples made at a time.")] = 1,
    seed: Annotated[
        int, typer.Option("--seed", help="Every sample's random draws follow from it, its length and its index.")
    ] = 123,
    kernel: Kernel = None,
    device: Device = None,
    form: Annotated[Format, typer.Option("--format", help="Format of the structure files.")] = Format.pdb,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make samples anew that are there already; else they are kept.")
    ] = False,
    trajectories: Annotated[
        bool,
        typer.Option(
            "--trajectories/--no-trajectories",
            help="Whether to write bb_traj.pdb and x0_traj.pdb, every step (some 80 kB a residue at 500 steps).",
        ),
    ] = True,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Sample proteins from a Multiflow checkpoint, on the kernels that you name.

    Samples that are there already are kept: after Ctrl-C, the same command makes what is missing. The same seed gives
    the same samples, whatever the batch size and the device, up to rounding. Several processes may fill one folder:
    under torchrun, srun or mpirun, or started by hand, they share the samples, and take over what one of them that
    died has left.
    """
    lengths = length_numbers(length)
    chains = split(chain) or None
    # Before the weights are read, which can take a while: a word that is wrong here is wrong with any weights.
    from ..configs.resolve import resolve_kernel

    resolve_kernel(command_line=kernel or ())

    from ..compat.multiflow.checkpoint.loading import load
    from ..compat.multiflow.runs.rank import Worker
    from ..compat.multiflow.runs.sampling import run_sampling
    from ..kernels.registry import record_kernels

    worker = Worker.from_environment()
    if worker.local_rank:  # what is wrong with a machine is told by its first process
        warnings.simplefilter("ignore")
    model = load(weights, device=_device(device, worker), command_line=kernel or ())
    kernels: dict[str, None] = {}
    with record_kernels() as ran, stopped_by_sigterm():

        def kernels_so_far() -> list[str]:
            # The record has an entry for each call of each step: emptied, or a long run would fill the memory.
            kernels.update(dict.fromkeys(ran))
            ran.clear()
            return list(kernels)

        try:
            done = run_sampling(
                model,
                model.config.get("interpolant") or {},
                out,
                lengths=lengths,
                num=num,
                task=task.value,
                pdb=list(pdb) if pdb else None,
                chain=chains,
                seed=seed,
                batch_size=batch_size,
                num_timesteps=timesteps,
                contigs=contigs,
                rewrite_fixed_types=rewrite_fixed_types,
                form=form.value,
                overwrite=overwrite,
                write_trajectories=trajectories,
                kernels=kernels_so_far,
                arguments={
                    "weights": str(weights),
                    "kernel": list(kernel or ()),
                    "kernel_config": str(model.kernels.resolved) if model.kernels else "",
                    "device": str(_device_of(model)),
                },
                worker=worker,
            )
        except KeyboardInterrupt:
            if worker.rank == 0:
                print(
                    f"stopped: the samples that are finished stay in {out}; the same command makes the rest",
                    file=sys.stderr,
                )
            raise
    if worker.rank:
        return
    report = _report(model, done, list(kernels), worker, form.value)
    if json:
        print_json(report)
    else:
        print(_text(report))


def _device(asked: str | None, worker: Worker) -> str:
    """Where this process's model goes, which then is the device that kernels are launched on."""
    import torch

    device = best_device() if asked is None else asked
    if not worker.alone:
        device = device_of_rank(device, worker.local_rank)
    if device.startswith("cuda:") and device[5:].isdecimal() and int(device[5:]) < torch.cuda.device_count():
        torch.cuda.set_device(int(device[5:]))
    return device


def _device_of(model: FlowModel) -> Any:
    return next(model.parameters()).device


def _report(model: FlowModel, done: SamplingRun, kernels: list[str], worker: Worker, form: str) -> dict[str, Any]:
    return {
        "out": str(done.out_dir),
        "written": [str(done.out_dir / sample.folder) for sample in done.written],
        "kept": [str(done.out_dir / sample.folder) for sample in done.kept],
        "seconds": round(done.seconds, 3),
        "device": str(_device_of(model)),
        "processes": worker.world_size,
        "format": form,
        "kernels": kernels,
        "bound": model.kernels.as_dict() if model.kernels else None,
    }


def _text(report: dict[str, Any]) -> str:
    """What a person wants to see of a run: the files (the first few), and the kernels."""
    written, kept = report["written"], report["kept"]
    on = report["device"] if report["processes"] == 1 else f"{report['processes']} processes"
    lines = [f"{len(written)} sample(s) written to {report['out']} in {report['seconds']:.1f} s on {on}"]
    ending = ".cif" if report["format"] == "mmcif" else ".pdb"
    lines += [f"  {folder}/sample{ending}" for folder in written[:8]]
    if len(written) > 8:
        lines.append(f"  ... and {len(written) - 8} more")
    if kept:
        lines.append(f"{len(kept)} sample(s) were there already and are kept (--overwrite makes them anew)")
    lines += ["kernels that ran:", *(f"  {name}" for name in report["kernels"])] if report["kernels"] else []
    lines.append(f"sequences: {report['out']}/sample.fasta; the run: {report['out']}/run.json")
    return "\n".join(lines)
