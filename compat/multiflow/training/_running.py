"""A whole training run: from a config and a folder of structures to a folder with checkpoints.

::

    out/
        config.yaml    the whole config
        last.ckpt      a Lightning checkpoint with the original's keys; `multiflow.load(out)` reads both
        losses.csv     a row for each step
        run.json       what ran: arguments, versions, machine, kernels
        logs/          the logger's files
        epoch=..ckpt   what `experiment.checkpointer` keeps
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ....errors import BadInput
from ....kernels.registry import record_kernels
from ...files.atomic import write_whole
from ..checkpoint.files import CONFIG_NAME, LIGHTNING_NAME, read_checkpoint
from ..config.sections import read_config
from ._batches import MakeBatches, TrainingData
from ._callbacks import LastCheckpoint, LossTable, StoppedByUser
from ._lightning_module import TrainingModule
from ._loggers import loggers
from ._progress import StepBar
from ._safe_checkpoints import SafeCheckpointIO, check_fits, read_training_checkpoint
from ._trainer_arguments import callbacks, check_experiment, checkpointer, trainer_options
from .objective import LossNotFinite
from .record import TrainingRecord
from .run_config import RunConfig, read_run_config


@dataclass(frozen=True)
class TrainingRun:
    """What `train` did.

    Attributes:
        out: The output folder.
        step: Steps of the optimizer, those before the run was resumed too.
        resumed_at: Steps that had been taken when this run began; 0 unless it was resumed.
        stopped: Whether it was stopped before its end.
        last: The losses of the last step, and what else a row of `losses.csv` has.
        seconds: Time of this run.
        kernels: The kernels that ran.
        module: The trained module, on the CPU again.
        device: Where it was trained.
    """

    out: Path
    step: int
    resumed_at: int
    stopped: bool
    last: Mapping[str, float]
    seconds: float
    kernels: tuple[str, ...]
    module: TrainingModule
    device: str


def train(
    config: Any,
    data: str | os.PathLike[str] | MakeBatches,
    out: str | os.PathLike[str],
    *,
    steps: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    kernel: Any = None,
    command_line: Iterable[str] = (),
    validation: str | os.PathLike[str] | MakeBatches | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 600.0,
    progress: bool | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> TrainingRun:
    """Trains a Multiflow model.

    The noise of a batch, its dropout, and which batch it is follow from the seed, the batch's number and the rank: a
    run that is resumed gives what an unbroken one gives. Ctrl-C (and SIGTERM) ends the run after the step that it is
    in; `last.ckpt` is then as new as that step, and after a crash or `kill -9` at most ``checkpoint_seconds`` old.

    Args:
        config: A YAML file or its content; see `run_config.read_run_config`.
        data: A folder of PDB and mmCIF files; or a function that makes the batches, see `_batches.MakeBatches`.
        out: The output folder; it is made. It must not hold another run.
        steps: Steps of the optimizer in all, in place of the config's `max_epochs` and `max_steps`.
        seed: In place of `experiment.seed`.
        device: See `_trainer_arguments.trainer_options`.
        kernel: See `multiflow.load`.
        command_line: The values of `--kernel`.
        validation: Structures that are validated on; by default the config's `data.validation`.
        resume: Goes on from ``out/last.ckpt``.
        checkpoint_seconds: How far `last.ckpt` may be behind.
        progress: False shows no progress; by default a bar on a terminal, and a line every half minute elsewhere.
        arguments: Anything else to note in `run.json` under `arguments`; must be JSON.

    Raises:
        BadInput: The config, the data or the checkpoint to resume cannot be used.
        LossNotFinite: The loss is NaN or infinite. `last.ckpt` is that of the last time it was written.
        KernelUnavailable: A required kernel cannot run here.
    """
    out = Path(out)
    settings = _with_seed(read_run_config(config), seed)
    experiment = settings.experiment
    check_experiment(experiment)
    options = trainer_options(experiment, device, steps)
    start = _start(out, resume, experiment.warm_start)

    torch.manual_seed(experiment.seed)
    module = TrainingModule(settings.whole, kernel=kernel, command_line=command_line)
    begun = 0
    if start is not None:
        content = read_training_checkpoint(start)
        check_fits(module, content["state_dict"], start)
        begun = int(content["global_step"])
    elif experiment.raw_state_dict_reload is not None:
        weights = read_checkpoint(experiment.raw_state_dict_reload)
        check_fits(module.model, weights.state_dict, weights.source)
        module.model.load_state_dict(weights.state_dict)

    train_data = _batches(data, settings)
    folder = settings.data.get("validation") if validation is None else validation
    valid_data = None if folder is None else _batches(folder, settings)
    if valid_data is None:
        options["limit_val_batches"] = 0
    most = int(options.get("max_steps", -1))
    if start is not None and 0 <= most <= begun:
        return TrainingRun(out, begun, begun, False, {}, 0.0, (), module, str(options["accelerator"]))
    out.mkdir(parents=True, exist_ok=True)
    record = TrainingRecord(
        out / "run.json",
        {
            "arguments": {"data": None if callable(data) else str(data), "steps": steps, **(arguments or {})},
            "resumed": None if start is None else str(start),
            "seed": experiment.seed,
            "device": str(options["accelerator"]),
            "devices": options["devices"],
            "precision": str(options.get("precision", "32-true")),
            "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
            "kernel": str(module.model.kernels.resolved) if module.model.kernels else "",
        },
    )
    show = progress is not False
    last = LastCheckpoint(out, checkpoint_seconds)
    more = callbacks(experiment)
    own_bar = any(isinstance(each, ProgressBar) for each in more)
    bar = [StepBar()] if show and sys.stderr.isatty() and not own_bar else []
    table = LossTable(out / "losses.csv", 30.0 if show and not sys.stderr.isatty() else None)
    with _quiet(), _trainer_errors(), record_kernels() as ran:
        seen = _Kernels(ran)
        trainer = lightning.Trainer(
            **options,
            # `last` behind the user's: averaged weights are brought up to the step before they are saved.
            callbacks=[seen, table, *more, last, checkpointer(experiment.checkpointer, out), *bar],
            logger=loggers(experiment.logger, out, experiment.wandb),
            default_root_dir=str(out),
            plugins=[SafeCheckpointIO()],
            use_distributed_sampler=False,
            enable_progress_bar=bool(bar) or own_bar,
            enable_model_summary=False,
        )
        if trainer.is_global_zero:
            _write_config(settings, out, resume)
            record.write("_running")
        status, problem = "failed", None
        try:
            with _stopping(last):
                trainer.fit(module, datamodule=TrainingData(train_data, module, valid_data), ckpt_path=start)
            status = "complete"
        except StoppedByUser:
            status = "interrupted"
        except LossNotFinite as error:
            problem = f"step {trainer.global_step + 1}: {error}"
            raise LossNotFinite(f"{problem}\n  {_kept(last.path)}") from error
        finally:
            record.kernels, record.last = seen.names, table.last
            if trainer.is_global_zero:
                record.write(status, problem)  # type: ignore[arg-type]
    return TrainingRun(
        out,
        trainer.global_step,
        begun,
        status == "interrupted",
        table.last,
        record.seconds,
        tuple(seen.names),
        module,
        str(trainer.strategy.root_device),
    )


class _Kernels(lightning.Callback):
    """Gathers the names of the kernels that ran: the record has an entry for each call, and would fill the memory."""

    def __init__(self, ran: list[str]) -> None:
        self._ran, self._names = ran, dict[str, None]()

    @property
    def names(self) -> list[str]:
        return list(self._names)

    def on_train_batch_end(self, *args: Any) -> None:
        self._names.update(dict.fromkeys(self._ran))
        self._ran.clear()


def _batches(data: Any, settings: RunConfig) -> MakeBatches:
    if callable(data):
        return data
    from ..dataset import training_batches

    def make(seed: int, rank: int, world_size: int) -> Any:
        return training_batches(data, settings.data, seed=seed, rank=rank, world_size=world_size)

    return make


def _with_seed(settings: RunConfig, seed: int | None) -> RunConfig:
    if seed is None:
        return settings
    whole = settings.whole.copy()
    whole.experiment.seed = seed
    return read_run_config(whole)


def _start(out: Path, resume: bool, warm_start: str | None) -> Path | None:
    """The checkpoint that training goes on from."""
    there = out / LIGHTNING_NAME
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file, not a folder to write checkpoints to")
    if resume:
        if not there.is_file():
            raise BadInput(f"{out}: there is no {LIGHTNING_NAME} to resume", "leave out --resume to begin.")
        return there
    if there.exists():
        raise BadInput(f"{out} holds a run already", "--resume goes on with it; or choose another folder.")
    return None if warm_start is None else Path(warm_start)


def _write_config(settings: RunConfig, out: Path, resume: bool) -> None:
    """Writes the whole config; says what differs from that of the run that is resumed."""
    path = out / CONFIG_NAME
    if resume and path.is_file():
        before, now = (_leaves(OmegaConf.to_container(each)) for each in (read_config(path), settings.whole))
        other = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if other:
            warnings.warn(f"{out} was begun with other settings: {', '.join(other[:8])}", stacklevel=3)
    write_whole(path, OmegaConf.to_yaml(settings.whole))


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _leaves(item, f"{name}.{key}" if name else str(key))
    return found


def _kept(path: Path) -> str:
    if not path.is_file():
        return "No checkpoint had been written before."
    age = max(0, round(time.time() - path.stat().st_mtime))
    return f"The last good checkpoint, {age} s old, stays in {path}."


@contextmanager
def _stopping(last: LastCheckpoint) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the run after its step; the second ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        last.stop = True
        print("stopping after this step; once more stops at once", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _trainer_errors() -> Iterator[None]:
    """Lightning's complaints about settings are the user's."""
    try:
        yield
    except MisconfigurationException as error:
        raise BadInput(f"experiment.trainer: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's advice about settings that are as they should be."""
    logger = logging.getLogger("pytorch_lightning")
    other = logging.getLogger("lightning.pytorch")
    levels = logger.level, other.level
    logger.setLevel(logging.WARNING)
    other.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in (
                ".*does not have many workers.*",
                ".*dataloader is not resumable.*",
                ".*Checkpoint directory .* exists and is not empty.*",
                ".*smaller than the logging interval.*",
                ".*isinstance.treespec, LeafSpec.*",
                ".*GPU available but not used.*",
                ".*You have overridden `on_before_batch_transfer`.*",
            ):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        logger.setLevel(levels[0])
        other.setLevel(levels[1])
