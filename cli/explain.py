"""`foldkernels explain`: which kernels a model would run, here or on another machine, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Debug, Device, Json, Kernel, check_known, lengths_option
from .options import lengths as length_numbers
from .reporting import print_json, reported

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from ..compat.multiflow.model import FlowModel

NAME = "explain"
SUMMARY = "Which kernels a model runs, and why."
EXAMPLES = """\b
Examples:
  foldkernels explain config.yaml --length 256
  foldkernels explain weights/ --machine h100 --kernel flash
  foldkernels explain weights/ --kernel attention=torch --json
"""


@reported
def run(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG|WEIGHTS",
            help="A Multiflow config.yaml, or a checkpoint (a folder or a file). The weights are not needed.",
            show_default=False,
        ),
    ],
    length: Annotated[list[str] | None, lengths_option("any")] = None,
    machine: Annotated[
        str | None,
        typer.Option(
            "--machine", metavar="NAME", help="h100, a100, rtx4090, mac or cpu: typical ones.  [default: this machine]"
        ),
    ] = None,
    kernel: Kernel = None,
    device: Device = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show which kernel each operation runs, why every better candidate does not, and what would mend that.

    Nothing is computed. Exit code 2 if the model could not run so: a kernel that is required cannot run there.
    """
    lengths: list[int | None] = [*dict.fromkeys(length_numbers(length))] or [None]

    from ..kernels.hardware.machine import MACHINES

    if machine is not None:
        check_known([machine], MACHINES, "machine", "--machine")

    from ..kernels.registry.explanation import explain

    empty, file = empty_model(model)
    explanations = [
        explain(empty, machine=machine, device=device, length=residues, command_line=kernel or (), file=file)
        for residues in lengths
    ]
    if json:
        reports = [explanation.as_dict() for explanation in explanations]
        print_json(reports[0] if len(reports) == 1 else reports)
    else:
        print("\n\n".join(map(str, explanations)))
    if not all(explanation.runs for explanation in explanations):
        raise typer.Exit(2)


def empty_model(path: Path) -> tuple[FlowModel, Any]:
    """The model of a config or a checkpoint, without its weights, and the file's `kernel:` section."""
    import torch

    from ..compat.multiflow.checkpoint.loading import described

    config, source = read_model_config(path)
    with torch.device("meta"):  # shapes are all that is needed
        empty = described(config, source)
    return empty, _kernel_section(config, source)


def read_model_config(path: Path) -> tuple[DictConfig, Path]:
    """The config that a path means, and the file it is from; weights are read only where the config is inside them."""
    from ..compat.multiflow.checkpoint.files import CONFIG_NAME, find_weights, read_checkpoint
    from ..compat.multiflow.config.sections import read_config

    path = path.expanduser()
    if path.suffix.lower() in (".yaml", ".yml"):
        return read_config(path), path
    beside = (path if path.is_dir() else find_weights(path).parent) / CONFIG_NAME
    if beside.is_file():
        return read_config(beside), beside
    checkpoint = read_checkpoint(path)
    return checkpoint.config, checkpoint.source


def _kernel_section(config: DictConfig, source: Path) -> Any:
    """The `kernel:` section: a word or a mapping, `${...}` resolved from the root; None where there is none."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from ..errors import BadInput

    try:
        section = OmegaConf.select(config, "kernel")
        return OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else section
    except OmegaConfBaseException as error:
        raise BadInput(f"{source}: the section `kernel:` does not resolve ({str(error).splitlines()[0]})") from None
