"""The progress bar of a training run: steps of the whole run, loss, time a step, time left."""

from __future__ import annotations

import math
import time
from typing import Any

import pytorch_lightning as lightning
from pytorch_lightning.callbacks import ProgressBar


class StepBar(ProgressBar):
    """Shows one bar on stderr for the whole run; its steps are the optimizer's.

    Lightning's own bar counts the batches of an epoch, which begins again after each.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None
        self._enabled = True
        self._started, self._first = 0.0, 0

    def disable(self) -> None:
        """Show nothing: on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar again."""
        self._enabled = True

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Open the bar, at the step that the run goes on from."""
        if not self._enabled:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._started, self._first = time.monotonic(), trainer.global_step
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[figures]}"))
        self._bar = Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=Console(stderr=True))
        total = trainer.estimated_stepping_batches
        steps = None if math.isinf(total) else int(total)
        self._task = self._bar.add_task("", total=steps, completed=trainer.global_step, figures="")
        self._bar.start()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar on."""
        if self._bar is None:
            return
        steps = trainer.global_step - self._first
        loss = trainer.callback_metrics.get("train/loss")
        figures = "" if loss is None else f"loss {float(loss):.4f}"
        if steps:
            figures += f"  {(time.monotonic() - self._started) / steps:.2f} s/step"
        self._bar.update(self._task, completed=trainer.global_step, figures=figures)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar, so that the message stands below it."""
        self._close()

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Close the bar."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
