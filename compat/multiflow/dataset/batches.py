"""Which items go into which batch, and how a batch is put together."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Sampler

from ....configs.data import SamplerConfig
from ....errors import BadInput
from .structures import Draw, StructureDataset


class _Bucket(NamedTuple):
    """Examples of nearly the same length, and how many items of them make a full batch."""

    examples: tuple[int, ...]
    full: int


class LengthBatchSampler(Sampler[list[Draw]]):
    """Batches of items of nearly the same length, whose size follows the square of the length as in Multiflow.

    An epoch's batches depend on the lengths, the settings, the seed, the epoch and the number of ranks, and on nothing
    else. Every rank has the same number of batches, in every epoch the same, and no item stands in two of them. Where
    batches do not share out evenly, the largest are split; where there is too little to split, a few are left out, in
    each epoch others. Batches that the ranks have at the same time are of about the same length.

    Args:
        lengths: Number of residues of each example.
        config: How long, how large, how often.
        seed: What everything is drawn from; not negative.
        rank: Number of this process.
        world_size: Number of processes.
        epoch: The first epoch.

    Attributes:
        epoch: The epoch that is drawn next. It does not move on by itself: see `set_epoch`.

    Raises:
        BadInput: There are fewer items than processes.
        ValueError: A rank that is not below ``world_size``, or a negative number.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        config: SamplerConfig | None = None,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        if seed < 0:
            raise ValueError(f"the seed must not be negative, and it is {seed}")
        self._lengths = list(lengths)
        self._config = config or SamplerConfig()
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._buckets = _buckets(self._lengths, self._config)
        items = len(self._lengths) * self._config.repeats
        if items < world_size:
            raise BadInput(
                f"{items} item(s) an epoch are too few for {world_size} processes",
                "train on fewer processes, or raise sampler.repeats.",
            )
        batches = sum(-(-len(bucket.examples) * self._config.repeats // bucket.full) for bucket in self._buckets)
        self._splits = -batches % world_size
        if self._splits > items - batches:  # then there are more batches than processes
            self._splits = 0
        self._steps = (batches + self._splits) // world_size
        self.set_epoch(epoch)

    @property
    def sampler(self) -> LengthBatchSampler:
        """Itself: Lightning calls ``batch_sampler.sampler.set_epoch`` at the start of each epoch."""
        return self

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Chooses the epoch that is drawn next.

        Args:
            epoch: Its number, from 0.
            skip: How many of its batches are passed over, once: those that an interrupted run has had.
        """
        if epoch < 0 or skip < 0:
            raise ValueError(f"epoch {epoch} and skip {skip} must not be negative")
        self.epoch, self._skip = epoch, skip

    def __len__(self) -> int:
        """Number of this process's batches in an epoch."""
        return self._steps

    def __iter__(self) -> Iterator[list[Draw]]:
        skip, self._skip = self._skip, 0
        for step in self.epoch_steps(self.epoch)[skip:]:
            yield step[self._rank]

    def epoch_steps(self, epoch: int) -> list[list[list[Draw]]]:
        """An epoch's batches: for each step, the one of each rank."""
        # Never the numbers that an item is drawn from: those are four, and missing ones count as zeros.
        rng = np.random.default_rng([self._seed, epoch, 0, 0, 1])
        batches = [batch for bucket in self._buckets for batch in self._bucket_batches(bucket, epoch, rng)]
        _split_largest(batches, self._splits)
        # What does not fill a last step is left out, whatever its length; then neighbours in length make a step.
        kept = [batches[place] for place in rng.permutation(len(batches))[: self._steps * self._world_size]]
        kept.sort(key=lambda batch: max(self._lengths[draw.example] for draw in batch))
        steps = [kept[place : place + self._world_size] for place in range(0, len(kept), self._world_size)]
        return [
            [self._filled(steps[place][rank]) for rank in rng.permutation(self._world_size)]
            for place in rng.permutation(len(steps))
        ]

    def _bucket_batches(self, bucket: _Bucket, epoch: int, rng: np.random.Generator) -> list[list[Draw]]:
        draws = [
            Draw(index, (self._seed, epoch, repeat))
            for index in bucket.examples
            for repeat in range(self._config.repeats)
        ]
        order = np.array_split(rng.permutation(len(draws)), -(-len(draws) // bucket.full))
        return [[draws[place] for place in batch] for batch in order]

    def _filled(self, batch: list[Draw]) -> list[Draw]:
        if not self._config.fill_batches:
            return batch
        times = _full(max(self._lengths[draw.example] for draw in batch), self._config) // len(batch)
        # Each of them is drawn anew, with a number that no other has.
        return [
            Draw(index, (seed, epoch, repeat + time * self._config.repeats))
            for time in range(max(times, 1))
            for index, (seed, epoch, repeat) in batch
        ]


def _full(length: int, config: SamplerConfig) -> int:
    return min(config.max_batch_size, config.max_num_res_squared // length**2 + 1)


def _buckets(lengths: Sequence[int], config: SamplerConfig) -> list[_Bucket]:
    buckets: list[_Bucket] = []
    longest = 0
    members: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if members and longest - lengths[index] > config.length_bucket:
            buckets.append(_Bucket(tuple(members), _full(longest, config)))
            members = []
        if not members:
            longest = lengths[index]
        members.append(index)
    if members:
        buckets.append(_Bucket(tuple(members), _full(longest, config)))
    return buckets


def _split_largest(batches: list[list[Draw]], times: int) -> None:
    """Halves the batch with the most items, so many times."""
    by_size = [(-len(batch), place) for place, batch in enumerate(batches)]
    heapq.heapify(by_size)
    for _ in range(times):
        _, place = heapq.heappop(by_size)
        half = len(batches[place]) // 2
        batches.append(batches[place][half:])
        batches[place] = batches[place][:half]
        for part in (place, len(batches) - 1):
            heapq.heappush(by_size, (-len(batches[part]), part))


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Puts items into a batch, the shorter ones padded.

    Args:
        items: Features of `StructureDataset`, each of its own length.

    Returns:
        The same features, with a batch dimension in front and the longest item's length. What is padded is zero, the
        masks too; ``rotmats_1`` is the identity. ``csv_idx`` is of shape ``[b, 1]``.
    """
    batch = {
        name: pad_sequence([item[name] for item in items], batch_first=True) for name in items[0] if name != "csv_idx"
    }
    for item, rotmats in zip(items, batch["rotmats_1"], strict=True):
        rotmats[len(item["rotmats_1"]) :] = torch.eye(3)
    batch["csv_idx"] = torch.stack([item["csv_idx"] for item in items])
    return batch


def training_batches(
    folder: str | os.PathLike[str] | StructureDataset,
    config: Any = None,
    *,
    seed: int = 0,
    epoch: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[dict[str, Tensor]]:
    """The batches of a folder of structures.

    Args:
        folder: The folder, or a data set that was read before.
        config: The settings, in any form that `as_data_config` takes; a data set has its own.
        seed: What crops and the order of batches are drawn from.
        epoch: The first epoch; ``loader.batch_sampler.set_epoch`` chooses another.
        rank: Number of this process.
        world_size: Number of processes.

    Returns:
        A loader that gives an epoch's batches each time it is gone through. Lightning chooses the epochs; it must not
        put a sampler of its own in place of this one (``use_distributed_sampler=False``).

    Raises:
        BadInput: As `StructureDataset` and `LengthBatchSampler` do.
    """
    if isinstance(folder, StructureDataset):
        dataset = folder
    else:
        dataset = StructureDataset(folder, config, rank=rank, world_size=world_size)
    workers = dataset.config.loader.num_workers
    return DataLoader(
        dataset,
        batch_sampler=LengthBatchSampler(
            dataset.lengths, dataset.config.sampler, seed=seed, rank=rank, world_size=world_size, epoch=epoch
        ),
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=dataset.config.loader.prefetch_factor if workers else None,
        persistent_workers=workers > 0,
    )
