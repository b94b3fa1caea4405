"""`foldkernels convert`: a checkpoint as safetensors, which no program has to trust."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, Json
from .reporting import print_json, reported

NAME = "convert"
SUMMARY = "Convert a checkpoint to safetensors."
EXAMPLES = """\b
Examples:
  foldkernels convert weights/ weights_safe/
  foldkernels convert weights/last.ckpt weights_safe/ --overwrite
  foldkernels sample weights_safe/ --length 100 --out out/
"""


@reported
def run(
    weights: Annotated[
        Path,
        typer.Argument(
            metavar="WEIGHTS", help="A folder with last.ckpt and config.yaml, or a .ckpt file.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The output folder; it is made.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files that are there.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert a Multiflow checkpoint to model.safetensors and config.yaml.

    The result loads like the original, on every machine, and holds no pickle. No code in the checkpoint is run. The
    weights are held against the config before anything is written.
    """
    from ..compat.multiflow.checkpoint.files import CONFIG_NAME, read_checkpoint, write_safetensors
    from ..compat.multiflow.checkpoint.loading import build
    from ..configs.presets import OPERATIONS

    checkpoint = read_checkpoint(weights)
    # The reference runs everywhere: what the file or the environment names may not run on this machine.
    build(checkpoint, dict.fromkeys(OPERATIONS, "reference"))
    written = write_safetensors(checkpoint, out, overwrite=overwrite)
    size = sum(tensor.numel() for tensor in checkpoint.state_dict.values())
    report = {
        "source": str(checkpoint.source),
        "weights": str(written),
        "config": str(written.parent / CONFIG_NAME),
        "tensors": len(checkpoint.state_dict),
        "numbers": size,
    }
    if json:
        print_json(report)
    else:
        print(f"{report['source']}: {report['tensors']} tensors, {size:,} numbers")
        print(f"written: {report['weights']}\n         {report['config']}")
