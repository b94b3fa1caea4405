"""The loggers that `experiment.logger` names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning import loggers as lightnings
from pytorch_lightning.loggers import Logger

from ....errors import BadInput
from .class_paths import build


def loggers(spec: Any, out: Path, wandb: Mapping[str, Any]) -> Any:
    """Build the trainer's loggers.

    Args:
        spec: `csv`, `tensorboard`, `wandb`, `none`, a class path with arguments, or a list of such.
        out: The run's folder; the named ones write to `logs/` in it.
        wandb: `experiment.wandb`, the arguments of the one called wandb.

    Raises:
        BadInput: There is no such logger, or it is not installed.
    """
    if spec == "none":
        return False
    if isinstance(spec, list):
        return [loggers(each, out, wandb) for each in spec if each != "none"]
    try:
        if spec == "csv":
            return lightnings.CSVLogger(str(out), name="logs")
        if spec == "tensorboard":
            return lightnings.TensorBoardLogger(str(out), name="logs")
        if spec == "wandb":
            return lightnings.WandbLogger(save_dir=str(out), **wandb)
    except (ModuleNotFoundError, ImportError) as error:
        raise BadInput(f"experiment.logger: {spec} cannot be used: {error}", f"pip install {spec}") from error
    return build(spec, Logger, "pytorch_lightning.loggers", "experiment.logger")
