"""Batches: of items of like length, shared among ranks, padded, the same from the same seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foldkernels.compat.multiflow.dataset import (
    Draw,
    LengthBatchSampler,
    StructureDataset,
    collate,
    training_batches,
)
from foldkernels.configs.data import SamplerConfig
from foldkernels.errors import BadInput

from ....support.structures import FEATURES, chain_lines, equal

LENGTHS = [int(length) for length in np.random.default_rng(3).integers(60, 385, size=331)]


def epoch(lengths: list[int], config: SamplerConfig, world_size: int = 1, **kwargs: Any) -> list[list[list[Draw]]]:
    """Each rank's batches of an epoch."""
    ranks = [
        LengthBatchSampler(lengths, config, rank=rank, world_size=world_size, **kwargs) for rank in range(world_size)
    ]
    batches = [list(sampler) for sampler in ranks]
    assert [len(own) for own in batches] == [len(sampler) for sampler in ranks] == [len(ranks[0])] * world_size
    return batches


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("bucket", [0, 8, 1000])
def test_batches_are_shared_among_ranks(world_size: int, bucket: int) -> None:
    config = SamplerConfig(max_batch_size=12, max_num_res_squared=200_000, length_bucket=bucket)
    batches = epoch(LENGTHS, config, world_size, seed=5, epoch=2)
    drawn = [draw.example for own in batches for batch in own for draw in batch]
    assert sorted(drawn) == list(range(len(LENGTHS)))  # no item twice, and none left out
    for own in batches:
        for batch in own:
            lengths = [LENGTHS[draw.example] for draw in batch]
            assert max(lengths) - min(lengths) <= bucket
            assert len(batch) <= min(12, 200_000 // max(lengths) ** 2 + 1)
    again = epoch(LENGTHS, config, world_size, seed=5, epoch=2)
    assert again == batches
    other_epoch, other_seed = (
        epoch(LENGTHS, config, world_size, seed=5, epoch=3),
        epoch(LENGTHS, config, world_size, seed=6, epoch=2),
    )
    assert batches[0] != other_epoch[0] != other_seed[0] != batches[0]
    assert len(other_epoch[0]) == len(batches[0])
    steps = [[max(LENGTHS[draw.example] for draw in batch) for batch in step] for step in zip(*batches, strict=True)]
    if bucket == 8:
        assert np.median([max(step) - min(step) for step in steps]) < 40  # of 324
    if bucket != 1000:
        order = [max(step) for step in steps]
        assert abs(np.corrcoef(order, range(len(order)))[0, 1]) < 0.5  # no bias of length along the epoch


def test_what_cannot_be_shared_out_is_left_out_in_turn() -> None:
    config = SamplerConfig(max_batch_size=1)
    left_out: set[int] = set()
    for number in range(60):
        batches = epoch([100] * 7, config, 3, epoch=number)
        drawn = sorted(draw.example for own in batches for batch in own for draw in batch)
        assert len(set(drawn)) == len(drawn) == 6
        left_out |= set(range(7)) - set(drawn)
    assert left_out == set(range(7))
    with pytest.raises(BadInput, match=r"2 item\(s\) an epoch are too few for 3 processes"):
        LengthBatchSampler([100, 100], world_size=3)
    assert sorted(len(own[0]) for own in epoch([100] * 5, SamplerConfig(), 4)) == [1, 1, 1, 2]


def test_an_epoch_is_taken_up_where_it_was_left() -> None:
    sampler = LengthBatchSampler(LENGTHS, seed=1)
    sampler.set_epoch(4)
    whole = list(sampler)
    sampler.sampler.set_epoch(4, skip=3)
    assert list(sampler) == whole[3:]
    assert list(sampler) == whole


def test_repeats_and_filled_batches() -> None:
    repeated = epoch([80, 80, 200], SamplerConfig(repeats=5, max_batch_size=4), seed=1)[0]
    draws = [draw for batch in repeated for draw in batch]
    assert len(set(draws)) == len(draws) == 15
    assert Counter(draw.example for draw in draws) == {0: 5, 1: 5, 2: 5}
    filled = epoch([80, 80, 200], SamplerConfig(fill_batches=True, max_batch_size=9), seed=1)[0]
    assert sorted((len(batch), {draw.example for draw in batch}) for batch in filled) == [(8, {0, 1}), (9, {2})]
    assert all(len(set(batch)) == len(batch) for batch in filled)


def test_a_batch_is_padded(folder: Path, settings: Callable[..., dict[str, Any]]) -> None:
    (folder / "a.pdb").write_text(chain_lines(20) + chain_lines(8, "B", start=50))
    data = StructureDataset(folder, settings())
    items = [data[1], data[0]]
    batch = collate(items)
    assert {name: value.dtype for name, value in batch.items()} == FEATURES
    assert batch["trans_1"].shape == (2, 20, 3)
    assert batch["rotmats_1"].shape == (2, 20, 3, 3)
    assert batch["csv_idx"].tolist() == [[1], [0]]
    for name in FEATURES.keys() - {"csv_idx"}:
        assert torch.equal(batch[name][0, :8], items[0][name])
        assert torch.equal(batch[name][1], items[1][name])
        padding = batch[name][0, 8:]
        assert torch.equal(padding, torch.eye(3).expand(12, 3, 3) if name == "rotmats_1" else padding * 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_gives_the_same_batches_again(
    folder: Path, settings: Callable[..., dict[str, Any]], num_workers: int
) -> None:
    for place, num_res in enumerate((20, 22, 30, 41)):
        (folder / f"{place}.pdb").write_text(chain_lines(num_res))
    config = settings(crop=21, loader={"num_workers": num_workers}, sampler={"repeats": 3, "max_batch_size": 2})
    loader = training_batches(folder, config, seed=3, epoch=1)
    first = list(loader)
    assert len(first) == len(loader) == 6
    loader.batch_sampler.sampler.set_epoch(2)
    other = list(loader)
    assert not all(map(equal, first, other))
    loader.batch_sampler.sampler.set_epoch(1)
    assert all(map(equal, first, loader))
    assert all(map(equal, first, training_batches(loader.dataset, seed=3, epoch=1)))
    for batch in first:
        assert all(value.isfinite().all() for value in batch.values())
        orthogonal = batch["rotmats_1"] @ batch["rotmats_1"].mT
        torch.testing.assert_close(orthogonal, torch.eye(3).expand_as(orthogonal), rtol=0, atol=1e-5)
