"""The batches of a training, from where a run was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Protocol

import pytorch_lightning as lightning
from torch.utils.data import DataLoader, Sampler

from ._lightning_module import TrainingModule

Batches = DataLoader[Any]
MakeBatches = Callable[[int, int, int], Batches]
"""Makes the batches of a process from the seed, its rank and the number of ranks. See `ContinuedBatches`."""


class EpochSampler(Protocol):
    """A batch sampler whose epochs can be asked for: each gives the same batches whenever it is."""

    def set_epoch(self, epoch: int) -> None: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


class ContinuedBatches(Sampler[Any]):
    """A batch sampler that begins where the run stands: the epoch, and the batch in it, follow from how many it had.

    Lightning's loop would begin the interrupted epoch again, with the batches that it has trained on.

    Args:
        sampler: What is drawn from.
        seen: How many batches the run has had.
    """

    def __init__(self, sampler: EpochSampler, seen: Callable[[], int]) -> None:
        self._sampler, self._seen = sampler, seen

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        # Not a generator: where worker processes read ahead, and where they do not, the place is that of this call.
        epoch, done = divmod(self._seen(), len(self._sampler))
        self._sampler.set_epoch(epoch)
        return islice(iter(self._sampler), done, None)


class TrainingData(lightning.LightningDataModule):
    """Hands Lightning the batches of its process.

    Args:
        make: Makes them, once the rank is known.
        module: What is trained: it knows how many batches it has had.
        validation: Makes the batches that are validated on, if any.
    """

    def __init__(self, make: MakeBatches, module: TrainingModule, validation: MakeBatches | None = None) -> None:
        super().__init__()
        self._make, self._module, self._validation = make, module, validation

    def train_dataloader(self) -> Batches:
        """The batches of this process, from where the run stands."""
        return self._loader(self._make, lambda: self._module.batches_seen)

    def val_dataloader(self) -> Batches | list[Any]:
        """The batches that this process validates on: the same each time; none by default."""
        return [] if self._validation is None else self._loader(self._validation, lambda: 0)

    def _loader(self, make: MakeBatches, seen: Callable[[], int]) -> Batches:
        trainer: Any = self.trainer
        loader = make(self._module.config.experiment.seed, trainer.global_rank, trainer.world_size)
        workers: dict[str, Any] = {}
        if loader.num_workers:
            workers = {"prefetch_factor": loader.prefetch_factor, "persistent_workers": True}
        sampler: Any = ContinuedBatches(loader.batch_sampler, seen)  # type: ignore[arg-type]
        return DataLoader(
            loader.dataset,
            batch_sampler=sampler,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            **workers,
        )
