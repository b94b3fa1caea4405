"""Multiflow's training as a Lightning module, with the original's checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytorch_lightning as lightning
import torch
from torch import Tensor

from ....kernels.registry.binding import bind
from ..flow.corruption import corrupt_batch
from ..flow.self_conditioning import self_condition
from ..model import FlowModel
from .objective import losses
from .run_config import read_run_config
from .schedules import learning_rate_schedule
from .seeding import seed_batch

_STATE = "foldkernels"
#: Number of the first batch of a validation, where its noise is drawn from the batch's number: no training gets there.
_VALIDATION = 1 << 40


class TrainingModule(lightning.LightningModule):
    """The model, its noise and its losses; everything else is Lightning's.

    Its `state_dict` holds the model's names after `model.`, and its hyperparameters are those of the original's
    `FlowModule`, so that either code loads the other's checkpoints.

    Args:
        cfg: A training config, in any form that `read_run_config` takes.
        dataset_cfg: Kept for the original, which asks for it.
        folding_cfg: Likewise.
        folding_device_id: Likewise.
        kernel: See `multiflow.load`.
        command_line: The values of `--kernel`.

    Attributes:
        model: The `FlowModel`, its kernels bound.
        batches_seen: How many batches this run has trained on, those before it was resumed too. The noise of the next
            follows from this number, the seed and the rank.
    """

    def __init__(
        self,
        cfg: Any,
        dataset_cfg: Any = None,
        folding_cfg: Any = None,
        folding_device_id: Any = None,
        *,
        kernel: Any = None,
        command_line: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.config = read_run_config(cfg)
        cfg = self.config.whole
        dataset_cfg = cfg.pdb_dataset if dataset_cfg is None else dataset_cfg
        folding_cfg = cfg.folding if folding_cfg is None else folding_cfg
        self.save_hyperparameters("cfg", "dataset_cfg", "folding_cfg", "folding_device_id", logger=False)
        self.model = FlowModel(self.config.model, self.config.options)
        self.model.config = cfg
        self.model.kernels = bind(self.model, kernel, command_line=command_line, file=self.config.kernel)
        self.batches_seen = 0
        self._self_conditioned = False
        self._validated = 0

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Noises the batch while it is on the CPU, where nothing waits for it."""
        seed = self.config.experiment.seed
        if self.trainer.validating or self.trainer.sanity_checking:
            self._self_conditioned = seed_batch(seed, _VALIDATION + self._validated, self.global_rank)
            self._validated += 1
        elif self.trainer.training:
            self._self_conditioned = seed_batch(seed, self.batches_seen, self.global_rank)
        else:
            return batch
        return corrupt_batch(batch, self.config.interpolant)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The mean training loss of a noisy batch; for half of the batches after a first guess of the model."""
        noisy = batch
        if self.config.interpolant.self_condition and self._self_conditioned:
            noisy = self_condition(self.model, batch)
        found = losses(self.model, noisy, self.config.experiment.training)
        self.batches_seen += 1
        size = len(batch["res_mask"])
        means = {name: value.mean() for name, value in found.items()}
        total = means.pop("train_loss")
        self.log_dict({f"train/{name}": value.detach() for name, value in means.items()}, batch_size=size)
        self.log("train/loss", total.detach(), batch_size=size)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=size)
        self.log("train/length", float(batch["res_mask"].shape[1]), batch_size=size)
        self.log("train/batch_size", float(size), batch_size=size)
        return total

    def on_validation_start(self) -> None:
        """Begin with the noise of the first batch: every validation sees the same."""
        self._validated = 0

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log the losses of a noisy batch as `valid/...`; the means over the items of all batches and ranks."""
        noisy = batch
        if self.config.interpolant.self_condition and self._self_conditioned:
            noisy = self_condition(self.model, batch)
        results = losses(self.model, noisy, self.config.experiment.training)
        means = {f"valid/{name}": value.mean() for name, value in results.items()}
        means["valid/loss"] = means.pop("valid/train_loss")
        self.log_dict(means, batch_size=len(batch["res_mask"]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW with `experiment.optimizer`, on all parameters that learn, and `experiment.lr_scheduler`, if any."""
        free = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(free, **self.config.experiment.optimizer)
        schedule = learning_rate_schedule(self.config.experiment, optimizer)
        return optimizer if schedule is None else {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the original's checkpoints have no place for, under a key of our own, which it passes over."""
        checkpoint[_STATE] = {"batches_seen": self.batches_seen, "seed": self.config.experiment.seed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes it back. In a checkpoint of the original's there is none: its batches count as a first epoch."""
        self.batches_seen = int((checkpoint.get(_STATE) or {}).get("batches_seen", 0))
