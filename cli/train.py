"""`foldkernels train`: a Multiflow model from a folder of structures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Debug, Device, Json, Kernel
from .reporting import print_json, reported

if TYPE_CHECKING:
    from ..compat.multiflow.training import TrainingRun

NAME = "train"
SUMMARY = "Train a Multiflow model on a folder of structures."
EXAMPLES = """\b
The config has Multiflow's sections (model, interpolant, data, experiment) and ours (kernel, foldkernels); all but
`model:` may be left out, and `model: {}` is the published size.
\b
Examples:
  foldkernels train config.yaml --data structures/ --out run/
  foldkernels train config.yaml --data structures/ --out run/ --steps 20000 --kernel flash
  foldkernels train config.yaml --data structures/ --out run/ --resume
  foldkernels train config.yaml --data structures/ --check-data
  torchrun --nproc-per-node 8 -m foldkernels train config.yaml --data structures/ --out run/
\b
Writes:
  OUT/last.ckpt, OUT/config.yaml   `foldkernels sample OUT ...` reads them, and so does Multiflow's own code
  OUT/losses.csv                   a row for each step
  OUT/run.json                     arguments, versions, machine, kernels that ran
"""


@reported
def run(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="The training config, a YAML file.", show_default=False)
    ],
    data: Annotated[
        Path,
        typer.Option(
            "--data", metavar="DIR", help="A folder of PDB or mmCIF files; the folders in it too.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The output folder; it is made.", show_default=False)
    ] = None,
    check_data: Annotated[
        bool,
        typer.Option(
            "--check-data", help="Read the data, say what is used and what is left out and why, and train nothing."
        ),
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Steps of the optimizer in all.  [default: the config's max_epochs]"),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", help="Weights, noise and the order of the data follow from it.  [default: the config's]"
        ),
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(
            "--validation",
            metavar="DIR",
            help="A folder of structures to validate on after each epoch.  [default: the config's data.validation]",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT/last.ckpt.")] = False,
    checkpoint_minutes: Annotated[
        float, typer.Option("--checkpoint-minutes", min=0.0, help="How far OUT/last.ckpt may be behind.")
    ] = 10.0,
    kernel: Kernel = None,
    device: Device = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a Multiflow model on the structures of a folder.

    Ctrl-C ends the run after the step that it is in, and --resume goes on from there: the losses are those of a run
    that was never stopped. Exit code 1 if the loss is no longer finite, or if --check-data finds nothing to train on.
    """
    # Before torch is imported, and the structures are read: a word that is wrong here is wrong with any data.
    from ..configs.resolve import resolve_kernel

    resolve_kernel(command_line=kernel or ())
    _check_paths(config, data, validation, out, resume=resume, needs_out=not check_data)
    if check_data:
        _check_data(config, data, json)
        return
    assert out is not None  # seen to above
    from ..compat.multiflow.training import LossNotFinite, train

    try:
        done = train(
            config,
            data,
            out,
            steps=steps,
            seed=seed,
            device=device,
            command_line=kernel or (),
            validation=validation,
            resume=resume,
            checkpoint_seconds=60 * checkpoint_minutes,
            arguments={"config": str(config), "kernel": list(kernel or ()), "device": device},
        )
    except LossNotFinite as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if done.module.global_rank != 0:
        return
    report = _report(done)
    if done.stopped:
        print(f"stopped after step {done.step}; the same command with --resume goes on from {out}", file=sys.stderr)
        raise typer.Exit(130)
    if json:
        print_json(report)
    else:
        print(_text(report))


def _check_paths(
    config: Path, data: Path, validation: Path | None, out: Path | None, *, resume: bool, needs_out: bool
) -> None:
    """Refuse paths that lead nowhere, before torch is imported, which takes seconds.

    Raises:
        BadInput: The first of them.
    """
    from ..errors import BadInput

    if not config.is_file():
        raise BadInput(f"{config}: there is no such file", "name the training config, a YAML file.")
    for folder in (data, validation):
        if folder is not None and not folder.is_dir():
            raise BadInput(f"{folder}: no such folder", "name a folder of PDB or mmCIF files.")
    if not needs_out:
        return
    if out is None:
        raise BadInput("--out is needed: the folder to write to")
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file, not a folder to write checkpoints to")
    last = out / "last.ckpt"
    if resume and not last.is_file():
        raise BadInput(f"{out}: there is no last.ckpt to resume", "leave out --resume to begin.")
    if not resume and last.exists():
        raise BadInput(f"{out} holds a run already", "--resume goes on with it; or choose another folder.")


def _check_data(config: Path, folder: Path, json: bool) -> None:
    from ..compat.multiflow.dataset import as_data_config, check_data
    from ..compat.multiflow.dataset.batches import LengthBatchSampler
    from ..compat.multiflow.training.run_config import read_run_config

    settings = as_data_config(read_run_config(config).data, f"{config}: data")
    report = check_data(folder, settings)
    lengths = [settings.cropped(length) for length in report.lengths]
    batches = len(LengthBatchSampler(lengths, settings.sampler)) if lengths else 0
    if json:
        print_json({**report.to_dict(), "batches": batches})
    else:
        print(report)
        print(f"batches of an epoch, on one process: {batches}")
    if not batches:
        raise typer.Exit(1)


def _report(done: TrainingRun) -> dict[str, Any]:
    return {
        "out": str(done.out),
        "steps": done.step,
        "resumed_at": done.resumed_at,
        "seconds": round(done.seconds, 3),
        "last": dict(done.last),
        "device": done.device,
        "kernels": list(done.kernels),
        "bound": done.module.model.kernels.as_dict() if done.module.model.kernels else None,
    }


def _text(report: dict[str, Any]) -> str:
    last = report["last"]
    first, steps = report["resumed_at"] + 1, report["steps"]
    if first > steps:
        return f"nothing to do: {report['out']} has taken {steps} step(s) already; a higher --steps goes on"
    losses = ", ".join(f"{name} {last[name]:.4f}" for name in last if name.endswith("_loss"))
    taken = f"{steps} step(s)" if first == 1 else f"steps {first} to {steps}" if first < steps else f"step {steps}"
    lines = [f"{taken}, {report['seconds']:.1f} s; the checkpoint: {report['out']}/last.ckpt"]
    lines += [f"the last step: {losses}"] if losses else []
    lines += ["kernels that ran:", *(f"  {name}" for name in report["kernels"])] if report["kernels"] else []
    lines.append(f"losses: {report['out']}/losses.csv; the run: {report['out']}/run.json")
    return "\n".join(lines)
