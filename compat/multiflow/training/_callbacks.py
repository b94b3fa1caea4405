"""What a run leaves behind while it trains: `last.ckpt`, `losses.csv`, a line now and then."""

from __future__ import annotations

import csv
import datetime
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
from torch import Tensor

from ...files.atomic import write_whole
from ..checkpoint.files import LIGHTNING_NAME
from .objective import LossNotFinite

COLUMNS = (
    "step", "epoch", "train_loss", "trans_loss", "rots_vf_loss", "aatypes_loss", "auxiliary_loss", "lr", "length",
    "batch_size", "seconds",
)  # fmt: skip
_LOSSES = COLUMNS[2:7]


class StoppedByUser(Exception):
    """The run was asked to stop, and has written its checkpoint."""


class LastCheckpoint(lightning.Callback):
    """Keeps `last.ckpt`: at most so many seconds behind, at the end, and when the run is asked to stop.

    It is only ever written between two steps of the optimizer, whole, and with finite weights: whenever a run is
    killed, what lies there can be resumed.

    Args:
        folder: Where.
        seconds: How far it may be behind.

    Attributes:
        stop: Set to True, from a signal handler: the run writes its checkpoint after the step that it is in, and raises
            `StoppedByUser`.
    """

    def __init__(self, folder: Path, seconds: float = 600.0) -> None:
        self.path = folder / LIGHTNING_NAME
        self.stop = False
        self._seconds = seconds
        self._saved_at, self._saved_step, self._step = time.monotonic(), -1, -1

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Counts from here."""
        self._saved_at, self._step = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves, if it is time to, or raises `StoppedByUser`."""
        if trainer.global_step == self._step:
            return  # gradients are still being added up, and no checkpoint holds those
        self._step = trainer.global_step
        # All ranks do the same, or they would wait for each other.
        stop = trainer.strategy.reduce_boolean_decision(self.stop, all=False)
        due = trainer.strategy.broadcast(time.monotonic() - self._saved_at >= self._seconds)
        # The last step too: after it Lightning closes the epoch, and a longer run would not finish it.
        if stop or due or trainer.global_step == trainer.max_steps:
            self.save(trainer, pl_module)
        if stop:
            raise StoppedByUser

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Saves, unless that is done."""
        if self._saved_step != trainer.global_step:
            self.save(trainer, pl_module)

    def save(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes the checkpoint.

        Raises:
            LossNotFinite: Some weights are not finite. The checkpoint that is there stays.
        """
        bad = [name for name, value in pl_module.named_parameters() if not bool(value.detach().isfinite().all())]
        if bad:
            count = f"{len(bad)} weight tensors" if len(bad) > 1 else "a weight tensor"
            raise LossNotFinite(f"after step {trainer.global_step} {count} is no longer finite, first {bad[0]}")
        trainer.save_checkpoint(self.path)
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step


class LossTable(lightning.Callback):
    """Writes `losses.csv`, a row for each step of the optimizer, and a line on stderr now and then.

    A row has the means over the batches of the step, on the first rank. A run that is resumed goes on behind the step
    that its checkpoint was written at.

    Args:
        path: The file.
        seconds: Between two lines on stderr; None for none.
    """

    def __init__(self, path: Path, seconds: float | None = None) -> None:
        self.path = path
        self.last: dict[str, float] = {}
        self._line_every = seconds
        self._rows: list[dict[str, float]] = []
        self._first = self._step = 0
        self._started = self._said = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Drops the rows of steps that are taken again."""
        self._step = self._first = trainer.global_step
        self._started = self._said = time.monotonic()
        if not trainer.is_global_zero:
            return
        kept = [",".join(COLUMNS)]
        if self._step and self.path.is_file():
            steps = [(line.partition(",")[0], line) for line in self.path.read_text(encoding="utf-8").splitlines()]
            kept += [line for step, line in steps if step.isdecimal() and int(step) <= self._step]
        write_whole(self.path, "\n".join(kept) + "\n")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds a row, when the optimizer has taken a step."""
        if not trainer.is_global_zero:
            return
        self._rows.append(_numbers(trainer.callback_metrics))
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        mean = {name: sum(row[name] for row in self._rows) / len(self._rows) for name in self._rows[0]}
        self._rows.clear()
        now = time.monotonic()
        self.last = {
            "step": self._step,
            "epoch": trainer.current_epoch,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": round(now - self._started, 3),
            **mean,
        }
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([_short(self.last[name]) for name in COLUMNS])
        if self._line_every is not None and now - self._said >= self._line_every:
            self._said = now
            rate = (self._step - self._first) / (now - self._started)
            print(self._line(trainer, mean["train_loss"], rate), file=sys.stderr, flush=True)

    def _line(self, trainer: lightning.Trainer, loss: float, rate: float) -> str:
        """The step, of how many, the loss, the time a step and the time left."""
        total = trainer.estimated_stepping_batches
        if math.isinf(total):
            return f"step {self._step}: loss {loss:.4f}, {1 / rate:.2f} s/step"
        left = datetime.timedelta(seconds=round((total - self._step) / rate))
        return f"step {self._step} of {int(total)}: loss {loss:.4f}, {1 / rate:.2f} s/step, {left} left"


def _numbers(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    names = {name: f"train/{name}" for name in (*_LOSSES, "length", "batch_size")} | {"train_loss": "train/loss"}
    return {name: float(metrics[logged]) for name, logged in names.items()}


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.9g}"
