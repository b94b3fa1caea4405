"""A training small enough for tests: a model of a few thousand weights, and crops of real chains as its data."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from foldkernels.compat.multiflow.structures.reading import Backbone, read_structure

PDB = Path(__file__).resolve().parents[1] / "goldens" / "pdb"

MODEL: dict[str, Any] = {
    "node_embed_size": 16,
    "edge_embed_size": 8,
    "node_features": {"c_pos_emb": 8, "c_timestep_emb": 8, "max_num_res": 200},
    "edge_features": {"feat_dim": 4},
    "ipa": {
        "c_hidden": 4, "no_heads": 2, "no_qk_points": 2, "no_v_points": 2,
        "seq_tfmr_num_heads": 2, "seq_tfmr_num_layers": 1, "num_blocks": 2,
    },
}  # fmt: skip


def config(accumulate: int = 1, lr: float = 1e-3, **sections: Any) -> dict[str, Any]:
    """A training config: `config(experiment__trainer={...})` goes deeper."""
    experiment = {"optimizer": {"lr": lr}, "trainer": {"accumulate_grad_batches": accumulate}, "logger": "none"}
    return {"model": MODEL, "experiment": experiment, **sections}


@cache
def _backbone() -> Backbone:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a residue without a frame is left out, which is said elsewhere
        return read_structure(PDB / "1odh.pdb", chain="A")


class Crops(Dataset[dict[str, Tensor]]):
    """Stretches of one chain."""

    def __init__(self, backbone: Backbone, length: int) -> None:
        self.backbone, self.length = backbone, length

    def __getitem__(self, start: int) -> dict[str, Tensor]:
        part = slice(start, start + self.length)
        trans, one = self.backbone.trans[part], torch.ones(self.length)
        return {
            "res_mask": one,
            "diffuse_mask": one.clone(),
            "aatypes_1": self.backbone.aatypes[part],
            "trans_1": trans - trans.mean(0),
            "rotmats_1": self.backbone.rotmats[part],
            "chain_idx": torch.ones(self.length, dtype=torch.long),
            "res_idx": torch.arange(1, self.length + 1),
            "csv_idx": torch.tensor([0]),
        }


class Starts(Sampler[list[int]]):
    """Five batches of two an epoch, drawn from the seed, the epoch and the rank."""

    def __init__(self, seed: int, rank: int) -> None:
        self.key, self.epoch = (seed, rank), 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(hash((*self.key, self.epoch)) % 2**31)
        for _ in range(5):
            yield torch.randint(100, (2,), generator=generator).tolist()


class Batches:
    """`MakeBatches`: what `train` takes in place of a folder.

    Args:
        length: Residues of a crop.
        workers: Processes that prepare batches.
    """

    def __init__(self, length: int = 10, workers: int = 0) -> None:
        self.crops = Crops(_backbone(), length)
        self.workers = workers

    def __call__(self, seed: int, rank: int, world_size: int) -> DataLoader[Any]:
        return DataLoader(self.crops, batch_sampler=Starts(seed, rank), num_workers=self.workers)
