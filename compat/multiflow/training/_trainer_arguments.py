"""What the config and the caller say about devices, steps and checkpoints, as Lightning's arguments."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ....configs.kernel import did_you_mean
from ....errors import BadInput
from .class_paths import build
from .settings import ExperimentConfig

#: Arguments of the trainer that are settled here, or by other settings.
_OURS = (
    "logger", "default_root_dir", "use_distributed_sampler", "enable_checkpointing",
    "enable_progress_bar", "enable_model_summary", "plugins", "max_time", "reload_dataloaders_every_n_epochs",
)  # fmt: skip
_ROUNDED_FRAMES = ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16")


def check_experiment(experiment: ExperimentConfig) -> None:
    """Refuses arguments that PyTorch and Lightning do not know, before anything is read or built.

    Raises:
        BadInput: The first such, with the nearest that exists.
    """
    _check_names("experiment.optimizer", experiment.optimizer, torch.optim.AdamW, ("params",))
    _check_names("experiment.trainer", experiment.trainer, lightning.Trainer, _OURS)
    _check_names("experiment.checkpointer", experiment.checkpointer, ModelCheckpoint, ("dirpath",))
    checkpointer(experiment.checkpointer, Path("."))
    callbacks(experiment)
    precision = str(experiment.trainer.get("precision", "32-true"))
    if precision in _ROUNDED_FRAMES:
        raise BadInput(
            f"experiment.trainer.precision: {precision} would round positions and rotations",
            "use bf16-mixed, or 32-true.",
        )


def callbacks(experiment: ExperimentConfig) -> list[lightning.Callback]:
    """The callbacks that `experiment.trainer.callbacks` lists.

    Raises:
        BadInput: It is no list, or an entry names no callback.
    """
    entries = experiment.trainer.get("callbacks") or []
    where = "experiment.trainer.callbacks"
    if not isinstance(entries, list):
        raise BadInput(f"{where}: {entries!r:.80} is no list", "write one class path a line, each after a dash.")
    home = "pytorch_lightning.callbacks"
    return [build(entry, lightning.Callback, home, f"{where}.{i}") for i, entry in enumerate(entries)]


def checkpointer(options: Mapping[str, Any], out: Path) -> ModelCheckpoint:
    """Lightning's ModelCheckpoint with `experiment.checkpointer`; `last.ckpt` is written by `LastCheckpoint`.

    Args:
        options: The section.
        out: The run's folder.

    Raises:
        BadInput: Lightning refuses the section.
    """
    options = {**options, "save_last": None}
    monitor = options.get("monitor")
    if monitor == "train/train_loss":  # the original's second name of it
        options["monitor"] = monitor = "train/loss"
    if monitor is not None and not str(monitor).startswith(("train/", "valid/")):
        # The original's base config waits for a metric that its validation computes, with ProteinMPNN and ESMFold.
        warnings.warn(
            f"experiment.checkpointer.monitor: {monitor} is not computed here; every checkpoint is kept instead",
            stacklevel=3,
        )
        options = {**options, "monitor": None, "save_top_k": -1}
    try:
        return ModelCheckpoint(dirpath=str(out), **options)
    except MisconfigurationException as error:
        top_k = options.get("save_top_k")
        fix = (
            f"save_top_k: {top_k} needs a metric to rank by (monitor: train/loss, or valid/loss with data.validation); "
            "-1 keeps every checkpoint, 1 the newest."
            if options.get("monitor") is None and top_k not in (None, -1, 0, 1)
            else "correct the section; its keys are ModelCheckpoint's."
        )
        raise BadInput(f"experiment.checkpointer: {error}", fix) from error


def trainer_options(experiment: ExperimentConfig, device: str | None, steps: int | None) -> dict[str, Any]:
    """The trainer's arguments.

    Args:
        experiment: `experiment`.
        device: `cpu`, `cuda`, `cuda:1` or `mps`; by default what the config says (`trainer.accelerator`), else the best
            one here.
        steps: Steps of the optimizer, in place of the config's epochs.

    Raises:
        BadInput: There is no such device here.
    """
    options = {
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 10,
        **experiment.trainer,
    }
    options.pop("callbacks", None)
    options |= _devices(experiment, device)
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun has started the processes: how many is settled
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        options |= {"devices": here, "num_nodes": int(os.environ["WORLD_SIZE"]) // here}
    one = options["devices"] == 1 or isinstance(options["devices"], list)  # a list is the one that `cuda:1` names
    if one and int(options.get("num_nodes", 1)) == 1:
        options.pop("strategy", None)  # the original's config says ddp, which a single process can do without
    else:
        options.setdefault("strategy", "ddp")
    if steps is not None:
        options = {**options, "max_steps": steps, "max_epochs": -1}
    if options.get("max_steps", -1) == -1 and options.get("max_epochs") is None:
        options["max_epochs"] = 200
    return options


def _devices(experiment: ExperimentConfig, device: str | None) -> dict[str, Any]:
    accelerator = str(experiment.trainer.get("accelerator", "auto"))
    if device is None:
        known = {"gpu": "cuda", "cuda": "cuda", "cpu": "cpu", "mps": "mps", "auto": _best()}
        if accelerator not in known:
            return {"accelerator": accelerator, "devices": experiment.num_devices}
        device = known[accelerator]
        if device == "cuda" and not torch.cuda.is_available():
            raise BadInput(
                f"experiment.trainer.accelerator is {accelerator}, and PyTorch can use no GPU of that kind here",
                f"train on what is here: --device {_best()}",
            )
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdecimal()):
        raise BadInput(f"device {device!r} is none of cpu, cuda, cuda:1 and mps")
    found = torch.cuda.device_count() if kind == "cuda" else int(kind == "cpu" or torch.backends.mps.is_available())
    if found == 0:
        raise BadInput(f"device {device!r} cannot be used here", f"use --device {_best()}")
    if index:
        if int(index) >= found:
            raise BadInput(f"device {device!r}: there are {found} here")
        return {"accelerator": "gpu", "devices": [int(index)]}
    if kind != "cuda":
        return {"accelerator": kind, "devices": 1}
    if experiment.num_devices > found:
        raise BadInput(f"experiment.num_devices is {experiment.num_devices}, and there are {found} GPU(s) here")
    return {"accelerator": "gpu", "devices": experiment.num_devices}


def _best() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _check_names(where: str, given: Mapping[str, Any], function: Callable[..., Any], ours: tuple[str, ...]) -> None:
    known = [name for name in inspect.signature(function).parameters if name not in ours]
    for name in given:
        if name in ours:
            raise BadInput(f"{where}.{name} is settled by foldkernels", "leave it out.")
        if name not in known:
            raise BadInput(f"{where}: no key {name!r}{did_you_mean(str(name), known)}")
